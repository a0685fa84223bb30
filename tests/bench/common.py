"""Documents made by hand, for the parts of the suite that only read them."""

from __future__ import annotations

from maefast.bench import results

ENVIRONMENT = {
    "date": "2026-01-02 03:04 UTC",
    "kind": "cpu",
    "device": "Test CPU",
    "cpu": "Test CPU",
    "cpu_threads": 2,
    "torch": "2.13.0",
    "triton": None,
    "maefast": "0.1.0",
    "commit": "0123456789ab",
    "dirty": False,
    "isa": "avx2",
}
LIMITS = {"condition": {}, "copy_gb_s": 10.0, "matrix_tflops": {"float32": 0.1, "bfloat16": 0.1}}
SHAPE = {"name": "vit_b", "batch": 16}


def micro_document(ratio: float = 3.0, share: float = 0.5, kind: str = "cpu") -> dict:
    base = {"op": "gather_tokens", "shape": SHAPE, "dtype": "float32", "direction": "forward"}
    clock = {"low_s": 1e-3, "high_s": 1e-3, "gb_s": 10.0, "limit": "memory", "limit_share": share}
    records = [
        {**base, **clock, "variant": "eager", "median_s": ratio * 1e-3},
        {**base, **clock, "variant": "maefast-cpu", "median_s": 1e-3, "ratios": {"eager": ratio}, "default": True},
        {**base, "variant": "compile", "error": "no compiler"},
    ]
    settings = {"rounds": 3, "machine": {"copy_gb_s": 20.0, "matrix_tflops": {}}, "cases_left_out": 0}
    environment = {**ENVIRONMENT, "kind": kind}
    return results.document("micro", environment, settings, ["eager", "compile"], records)


def step_document(ratio: float = 1.5) -> dict:
    shape = {"batch": 16, "img_size": [224, 224], "patch_size": [16, 16]}
    base = {"preset": "vit_b", "dtype": "float32", "shape": shape}
    clock = {"low_s": 1.0, "high_s": 1.0, "rounds": 3, "first_loss": 1.25}
    records = [
        {**base, **clock, "peer": name, "ratio": r, "step_s": r, "images_per_s": 16 / r, "peak_bytes": int(r * 2**30)}
        for name, r in (("maefast", 1.0), ("plain", ratio))
    ]
    for record in records:
        record["memory_ratio"] = record["ratio"]
    settings = {"steps_a_round": 2}
    return results.document("step", ENVIRONMENT, settings, ["maefast", "plain", "hf"], records)
