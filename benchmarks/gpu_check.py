"""The demo model on a GPU: kernels against the reference, tokens and logits (``python benchmarks/gpu_check.py``)."""

import json

import jax
import numpy as np

import ic_jax

TEXT = "The function returns a list of the names of the files in the directory, and a list of the values. " * 24


def main():
    out = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for pattern in (None, "uniform:4"):
        lms = {i: ic_jax.load(pattern=pattern, implementation=i, max_context=2048) for i in ("reference", "gpu")}
        ids = lms["gpu"].encode(TEXT)[:500]
        tokens = {i: [p.token for p in lm.stream(ids, max_tokens=48, ignore_eos=True)] for i, lm in lms.items()}
        logits = {i: lm.logits(ids) for i, lm in lms.items()}
        difference = np.abs(logits["gpu"] - logits["reference"])
        out[pattern or "all-full"] = dict(
            same_tokens=tokens["gpu"] == tokens["reference"], prompt=len(ids), generated=48,
            largest_logit_difference=float(difference.max()), mean_logit_difference=float(difference.mean()),
            largest_logit=float(np.abs(logits["reference"]).max()),
            same_top1=float((logits["gpu"].argmax(-1) == logits["reference"].argmax(-1)).mean()),
        )  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
