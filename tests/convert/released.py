"""A released checkpoint from the Hugging Face hub, converted, and its logits compared with the authors' own code.

    python -m tests.convert.released /tmp/released            # 0.8 GB; exits 3 without a network

Not a test CI runs. The revision is pinned, and with it every file: a commit of the hub holds the SHA-256 of its large
files, which are compared with what was downloaded. The authors' code runs in float32 on the CPU, in this process.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

REPOSITORY, REVISION = "OpenNLPLab/TransNormerLLM-385M", "c78a6f3d9315be099c147429b263787bf79a0050"
FILES = ["*.json", "*.py", "*.safetensors", "*.bin", "tokenizer.model"]
PROMPTS = ["Once upon a time, there was", "The capital of France is", "今天天气很好，我们"]
# Both in float32; the authors' decays are float32 powers, which differ from ours by up to 1e-6 a token.
LIMIT = 1e-3


def download(folder: Path) -> Path:
    """The pinned revision below `folder`. Exits if a file is not what the revision records."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(REPOSITORY, revision=REVISION, files_metadata=True)
    if info.sha != REVISION:
        sys.exit(f"the hub gives revision {info.sha} for {REVISION}")
    path = Path(
        snapshot_download(
            REPOSITORY, revision=REVISION, allow_patterns=FILES, local_dir=folder / REPOSITORY.split("/")[1]
        )
    )
    for file in info.siblings or []:
        if file.lfs is None or not (path / file.rfilename).is_file():
            continue
        with open(path / file.rfilename, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != file.lfs.sha256:
            sys.exit(
                f"{path / file.rfilename} has SHA-256 {digest}, revision {REVISION[:12]} records {file.lfs.sha256}"
            )
        print(f"{file.rfilename}: SHA-256 {digest[:12]}, as recorded")
    return path


def compare(release: Path, converted: Path) -> float:
    """The largest difference of the logits over the prompts, as a share of the largest logit."""
    import torch
    from transformers import AutoModelForCausalLM

    from tnllm.generation.loading import load

    loaded = load(converted, device="cpu", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32).eval()
    shares = []
    for prompt in PROMPTS:
        tokens = torch.tensor([loaded.encode(prompt)])
        with torch.no_grad():
            ours, expected = loaded.model(tokens)[0], theirs(tokens).logits
        shares.append(float((ours - expected).abs().max() / expected.abs().max()))
        top = int(expected[0, -1].argmax())
        print(f"{prompt!r}: {shares[-1]:.2e} of the largest logit; next {loaded.tokenizer.decode([top])!r}")
        if int(ours[0, -1].argmax()) != top:
            sys.exit("the most likely next token differs")
    return max(shares)


def main() -> None:
    """Download, check, convert, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the release and the result are kept")
    folder = parser.parse_args().folder
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    if not offline:
        from huggingface_hub import constants

        from tnllm.hub import answers

        offline = not answers(constants.ENDPOINT)
    if offline:
        print(f"offline: {REPOSITORY} cannot be downloaded, so nothing was compared", file=sys.stderr)
        sys.exit(3)
    from tnllm.convert.run import Options, convert

    release = download(folder)
    report = convert(release, folder / "converted", Options("tnllm", overwrite=True), print, lambda *_: None)
    share = compare(release, folder / "converted")
    print(
        json.dumps({"revision": REVISION, "parameters": report.source.num_parameters, "share": share, "limit": LIMIT})
    )
    # Written so that NaN fails.
    sys.exit(0 if share <= LIMIT else "the logits differ from those of the authors' code")


if __name__ == "__main__":
    main()
