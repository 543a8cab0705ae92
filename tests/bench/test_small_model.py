"""Where a small model's step goes: the prediction alone, without a GPU."""

import json

from tests.bench.small_model import MODEL, group, main, predict
from tnllm.modeling.flops import flops_per_token


def test_the_prediction(tmp_path, capsys):
    main(["--json", str(tmp_path / "small.json")])
    rows = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert sum(row["tflop"] for row in rows) * 1e12 == flops_per_token(MODEL, 2048) * 65536
    assert "must take" in capsys.readouterr().out
    # Every byte and product is of a token or of a weight.
    once, twice = predict(MODEL, 65536, 2048), predict(MODEL, 131072, 2048)
    assert all(twice[key][0] == 2 * once[key][0] for key in once)


def test_kernels_have_groups():
    names = ["attend_kernel", "nvjet_tst_128x256", "triton_red_fused_add_3", "_glu_backward_kernel", "fill"]
    sums = group(((name, 500.0) for name in names), steps=1)
    assert sums == {key: (0.5, 1.0) for key in ("attention", "products", "norms and sums", "GLU", "other")}
