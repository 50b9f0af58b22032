"""The emulated driver keeps to the book where the device relies on it: what streams do late, and what graphs are. The card's other tests believe it."""

import ctypes
import os
import struct
import subprocess
import sys
from ctypes import byref, c_char_p, c_float, c_uint64, c_void_p
from pathlib import Path

import pytest

# Also run as a program of its own, since the library takes the process's faults.
sys.path.insert(0, str(Path(__file__).parent))
COUNT = 8
INVALID_VALUE, INVALID_CONTEXT, ECC, INVALID_HANDLE = 1, 201, 214, 400


class Card:
    """Calls of the driver that must do, and the kernels `add_elements` (a += b) and `softcap_elements` on one stream."""

    def __init__(self):
        self.library = ctypes.CDLL(os.environ["CARD"])
        context, module, self.stream = c_void_p(), c_void_p(), c_void_p()
        for name, *given in [("cuInit", 0), ("cuDevicePrimaryCtxRetain", byref(context), 0), ("cuCtxSetCurrent", context), ("cuStreamCreate", byref(self.stream), 1)]:
            self.do(name, *given)
        self.do("cuModuleLoadData", byref(module), c_char_p(b"\x7fELF emulated\nrows.cu\nsm_90a\n"))
        self.kernels = {}
        for name in ["add_elements", "softcap_elements"]:
            self.kernels[name] = c_void_p()
            self.do("cuModuleGetFunction", byref(self.kernels[name]), module, c_char_p(name.encode()))

    def call(self, name: str, *given) -> int:
        return getattr(self.library, name)(*given)

    def do(self, name: str, *given):
        assert self.call(name, *given) == 0, name

    def memory(self, values: list[float]) -> c_uint64:
        address = c_uint64()
        self.do("cuMemAlloc_v2", byref(address), c_uint64(4 * COUNT))
        self.do("cuMemcpyHtoDAsync_v2", address, struct.pack(f"{COUNT}f", *values), c_uint64(4 * COUNT), self.stream)
        return address

    def read(self, address: c_uint64) -> float:
        """The first element; waits."""
        values = (c_float * COUNT)()
        self.do("cuMemcpyDtoHAsync_v2", values, address, c_uint64(4 * COUNT), self.stream)
        return values[0]

    def node(self, kernel: str, *arguments):
        """Parameters of a node, as the driver's header has them, and what they point to."""

        class Parameters(ctypes.Structure):
            _fields_ = [("kernel", c_void_p), ("sizes", ctypes.c_uint * 7), ("arguments", c_void_p), ("rest", c_void_p * 3)]

        places = (c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        return Parameters(self.kernels[kernel], (ctypes.c_uint * 7)(1, 1, 1, 256, 1, 1, 0), ctypes.addressof(places)), places

    def add(self, graph, after: list, kernel: str, *arguments) -> c_void_p:
        node, (parameters, _kept) = c_void_p(), self.node(kernel, *arguments)
        before = (c_void_p * len(after))(*after)
        self.do("cuGraphAddKernelNode_v2", byref(node), graph, before, c_uint64(len(after)), byref(parameters))
        return node

    def made(self, graph) -> c_void_p:
        executable = c_void_p()
        self.do("cuGraphInstantiateWithFlags", byref(executable), graph, c_uint64(0))
        return executable


def pinned_memory_is_read_when_the_copy_happens(card: Card):
    pinned, target = c_void_p(), card.memory([0.0] * COUNT)
    card.do("cuMemHostAlloc", byref(pinned), c_uint64(4 * COUNT), 0)
    values = ctypes.cast(pinned, ctypes.POINTER(c_float))
    values[0] = 1.0
    card.do("cuMemcpyHtoDAsync_v2", target, pinned, c_uint64(4 * COUNT), card.stream)
    values[0] = 2.0
    assert card.read(target) == 2.0
    event = c_void_p()
    card.do("cuEventCreate", byref(event), 2)
    card.do("cuMemcpyHtoDAsync_v2", target, pinned, c_uint64(4 * COUNT), card.stream)
    card.do("cuEventRecord", event, card.stream)
    card.do("cuEventSynchronize", event)
    values[0] = 3.0
    assert card.read(target) == 2.0, "what an event stands behind has happened"


def graphs_are_snapshots_whose_nodes_run_in_the_order_of_their_dependencies(card: Card):
    a, b, count, cap, graph = card.memory([4.0] * COUNT), card.memory([2.0] * COUNT), c_uint64(COUNT), c_float(1.0), c_void_p()
    card.do("cuGraphCreate", byref(graph), 0)
    first = card.add(graph, [], "add_elements", a, b, count)
    card.add(graph, [first], "softcap_elements", a, count, cap)
    executable = card.made(graph)
    # The arguments were copied.
    count.value, cap.value = 0, 100.0
    card.do("cuGraphLaunch", executable, card.stream)
    assert 0.99 < card.read(a) <= 1.0, "6 under a cap of 1"
    # From now on b += b. Neither the launch before nor the graph knows of it.
    count.value = COUNT
    parameters, _kept = card.node("add_elements", b, b, count)
    card.do("cuGraphLaunch", executable, card.stream)
    card.do("cuGraphExecKernelNodeSetParams_v2", executable, first, byref(parameters))
    assert card.read(b) == 2.0
    card.do("cuGraphLaunch", executable, card.stream)
    assert card.read(b) == 4.0
    again = card.made(graph)
    card.do("cuGraphDestroy", graph)
    card.do("cuGraphLaunch", again, card.stream)
    assert card.read(b) == 4.0, "the graph still adds to a"
    card.do("cuGraphExecDestroy", again)
    assert card.call("cuGraphLaunch", again, card.stream) == INVALID_HANDLE


def nodes_that_do_not_depend_on_each_other_run_the_later_first(card: Card):
    a, b, count, cap, graph = card.memory([4.0] * COUNT), card.memory([2.0] * COUNT), c_uint64(COUNT), c_float(1.0), c_void_p()
    card.do("cuGraphCreate", byref(graph), 0)
    card.add(graph, [], "add_elements", a, b, count)
    card.add(graph, [], "softcap_elements", a, count, cap)
    card.do("cuGraphLaunch", card.made(graph), card.stream)
    assert 2.9 < card.read(a) <= 3.0, "4 under a cap of 1, and then 2"


def what_is_wrong_is_refused(card: Card):
    a, count, cap, graph, other = card.memory([4.0] * COUNT), c_uint64(COUNT), c_float(1.0), c_void_p(), c_void_p()
    kernel, places = card.kernels["softcap_elements"], card.node("softcap_elements", a, count, cap)[1]
    for grid, threads, shared in [(0, 256, 0), (1, 2048, 0), (1, 256, 100 << 10)]:
        assert card.call("cuLaunchKernel", kernel, grid, 1, 1, threads, 1, 1, shared, card.stream, places, None) == INVALID_VALUE
    assert card.call("cuMemcpyHtoDAsync_v2", a, b"", c_uint64(4 * COUNT + 1), card.stream) == INVALID_VALUE
    assert card.call("cuStreamSynchronize", c_void_p(1)) == INVALID_HANDLE
    card.do("cuGraphCreate", byref(graph), 0)
    card.do("cuGraphCreate", byref(other), 0)
    stranger, parameters = card.add(other, [], "softcap_elements", a, count, cap), card.node("softcap_elements", a, count, cap)
    after = (c_void_p * 1)(stranger)
    assert card.call("cuGraphAddKernelNode_v2", byref(c_void_p()), graph, after, c_uint64(1), byref(parameters[0])) == INVALID_VALUE
    assert card.call("cuGraphExecKernelNodeSetParams_v2", card.made(graph), stranger, byref(parameters[0])) == INVALID_VALUE
    card.do("cuCtxSetCurrent", None)
    assert card.call("cuMemFree_v2", a) == INVALID_CONTEXT


def nothing_is_done_by_a_card_that_is_lost(card: Card):
    a, count, cap = card.memory([4.0] * COUNT), c_uint64(COUNT), c_float(1.0)
    places = card.node("softcap_elements", a, count, cap)[1]
    launch = ["cuLaunchKernel", card.kernels["softcap_elements"], 1, 1, 1, 256, 1, 1, 0, card.stream, places, None]
    assert [card.call(*launch) for _ in range(3)] == [0, 0, 0], "known when somebody waits"
    assert card.call("cuStreamSynchronize", card.stream) == ECC
    assert [card.call(*launch), card.call("cuMemFree_v2", a), card.call("cuCtxSetCurrent", None)] == [ECC, ECC, ECC]


CASES = {
    pinned_memory_is_read_when_the_copy_happens: "",
    graphs_are_snapshots_whose_nodes_run_in_the_order_of_their_dependencies: "",
    nodes_that_do_not_depend_on_each_other_run_the_later_first: "",
    what_is_wrong_is_refused: "",
    nothing_is_done_by_a_card_that_is_lost: "lost-after:2",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_driver(case, tmp_path):
    import servers

    card = servers.emulated_card(tmp_path, CASES[case])
    environment = os.environ | card | {"CARD": f"{card['LD_LIBRARY_PATH'].split(':')[0]}/libcuda.so.1"}
    done = subprocess.run([sys.executable, __file__, case.__name__], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


if __name__ == "__main__":
    globals()[sys.argv[1]](Card())
