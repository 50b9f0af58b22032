"""Compiles every kernel by NVRTC for sm_80 and sm_90a, without a card: nvrtc_check.py TOOLKIT (the folder of NVIDIA's Python packages). Run-time
compilation sees no CUDA header, so this is the test that the sources need none."""
import ctypes
import sys
import time
from pathlib import Path

here = Path(__file__).resolve().parent.parent
library = Path(sys.argv[1]) / "lib"
ctypes.CDLL(str(next(library.glob("libnvrtc-builtins.so*"))), mode=ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(library / "libnvrtc.so.13"))
failed = 0
for source in sorted(here.glob("*.cu")):
    for arch in ("sm_80", "sm_90a"):
        if "wgmma" in source.name and arch != "sm_90a":
            continue
        program, began = ctypes.c_void_p(), time.time()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--fmad=false", f"--include-path={here}"]
        rc = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        print(f"{source.name} {arch}: rc {rc}, {size.value} bytes, {time.time() - began:.1f} s")
        if rc:
            failed = 1
            print(log.value.decode()[:2000])
sys.exit(failed)
