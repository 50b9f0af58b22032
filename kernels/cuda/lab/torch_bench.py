"""What the vendor's libraries do on the same card in the same run: bf16 products of the lab's shapes, int8 products, PyTorch's own int4
kernel, attention of one query. Usage: torch_bench.py OUT.jsonl. Times as the lab takes them: graphs, rotating weights, medians."""
import json
import sys

import torch
import torch.nn.functional as F

out = open(sys.argv[1], "w")
torch.manual_seed(1)


def time_us(run, copies, expected_us):
    launches = max(8, min(64, int(1500 / expected_us)), min(copies, 64))
    for i in range(2):
        run(i % copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i % copies)
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(11):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1000 / launches)
    return sorted(times)[len(times) // 2]


def emit(kernel, what, rows, n, k, us, byte_count, operations):
    out.write(json.dumps({"kernel": kernel, "what": what, "rows": rows, "n": n, "k": k, "us": round(us, 3), "gb_s": round(byte_count / us / 1e3, 1), "tera_s": round(operations / us / 1e6, 2)}) + "\n")
    out.flush()


def attempt(name, body):
    try:
        body()
    except Exception as error:  # one missing op must not lose the rest
        print(f"torch_bench: {name}: {type(error).__name__}: {str(error)[:200]}")


def matmuls():
    for n, k, row_counts in [(8192, 8192, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]), (4096, 4096, [1, 16, 64, 1024, 4096]), (6144, 4096, [1, 16]), (28672, 4096, [1, 16]), (4096, 14336, [1, 16])]:
        copies = max(2, int(300e6 / (n * k * 2)) + 1)
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for rows in row_counts:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
            us = time_us(lambda i: torch.mm(x, weights[i].t(), out=y), copies, max(30, 2 * rows * n * k / 500e6))
            emit("cublas_bf16", "torch.mm", rows, n, k, us, 2 * (n * k + rows * (n + k)), 2 * rows * n * k)


def int8():
    n = k = 8192
    weights = [torch.randint(-128, 127, (n, k), device="cuda", dtype=torch.int8) for _ in range(4)]
    for rows in [64, 1024, 4096]:
        x = torch.randint(-128, 127, (rows, k), device="cuda", dtype=torch.int8)
        us = time_us(lambda i: torch._int_mm(x, weights[i].t()), 4, max(30, 2 * rows * n * k / 500e6))
        emit("cublas_int8", "torch._int_mm", rows, n, k, us, n * k + rows * (4 * n + k), 2 * rows * n * k)


def int4():
    for n, k in [(8192, 8192), (4096, 4096)]:
        copies = max(2, int(300e6 / (n * k / 2)) + 1)
        weights = [torch.ops.aten._convert_weight_to_int4pack(torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8), 8) for _ in range(copies)]
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        for rows in [1, 16, 64]:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            us = time_us(lambda i: torch.ops.aten._weight_int4pack_mm(x, weights[i], 128, scales), copies, 30)
            emit("torch_int4", "_weight_int4pack_mm g128", rows, n, k, us, n * k / 2 + n * k / 128 * 4 + 2 * rows * (n + k), 2 * rows * n * k)


def attention():
    for context in [1024, 4096]:
        for batch in [1, 16, 64]:
            byte_count = 4 * 128 * 8 * context * batch
            copies = max(2, min(48, int(300e6 / byte_count) + 1))
            keys = [torch.randn(batch, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            values = [torch.randn(batch, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
            us = time_us(lambda i: F.scaled_dot_product_attention(q, keys[i], values[i], enable_gqa=True), copies, byte_count / 1e6 + 20)
            emit("torch_sdpa", "one query, contiguous, grouped", batch, context, 8, us, byte_count, 4 * 128 * 4 * 8 * context * batch)


def copy():
    a = torch.randint(0, 1 << 30, (1 << 30,), device="cuda", dtype=torch.int32)
    b = torch.empty_like(a)
    emit("torch_copy", "4 GiB, read plus written", 0, 0, 0, time_us(lambda i: b.copy_(a), 1, 3000), 2 * a.numel() * 4, 0)


for name, body in [("copy", copy), ("matmuls", matmuls), ("int8", int8), ("int4", int4), ("attention", attention)]:
    attempt(name, body)
print("torch_bench: done", torch.__version__, torch.cuda.get_device_name())
