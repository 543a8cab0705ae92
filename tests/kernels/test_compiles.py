"""Every kernel compiles for GPUs that are not present, which the interpreter cannot show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_bwd_kernel",
    "_decode_narrow_kernel",
    "_decode_wide_kernel",
    "_fwd_kernel",
    "_glu_backward_kernel",
    "_glu_kernel",
    "_norm_gate_backward_kernel",
    "_norm_gate_kernel",
    "_silu_backward_kernel",
    "_silu_kernel",
    "_softmax_kernel",
    "add_initial_kernel",
    "attend_kernel",
    "bounds_kernel",
    "scan_states_kernel",
    "step_kernel",
    "sub_split_states_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, tmp_path):
    script = Path(__file__).with_name("compile_without_gpu.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, str(capability)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
