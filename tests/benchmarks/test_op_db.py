"""A sample of PyTorch's operator database through memplan; ``benchmarks/op_db.py`` runs all of it."""

from __future__ import annotations

import pytest
from op_models import operators, outcome

# One of each kind: pointwise, reductions, views, indexing, sorting, random, norms, products, complex, several outputs.
SAMPLE = (
    "add", "chunk", "cumsum", "sort", "topk", "index_put", "scatter_add", "gather", "where", "bmm", "einsum", "cat",
    "unsafe_chunk", "clone", "expand", "as_strided", "view_as_complex", "fft.rfft", "linalg.svd", "linalg.solve",
    "std_mean", "norm", "cummax", "masked_fill", "logsumexp", "softmax", "nn.functional.batch_norm",
    "nn.functional.layer_norm", "nn.functional.instance_norm", "nn.functional.conv2d", "nn.functional.dropout",
    "nn.functional.embedding",
    "nn.functional.interpolate.bilinear", "nn.functional.max_pool2d", "nn.functional.scaled_dot_product_attention",
    "nn.functional.cross_entropy", "nn.functional.pad.reflect", "nn.functional.gelu", "randn", "bernoulli", "var_mean",
)  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_operators_equal_eager(part: int) -> None:
    known = operators()
    found = {name: outcome(known[name]) for name in SAMPLE[part::4] if name in known}
    assert len(found) >= 7
    bad = {name: row for name, row in found.items() if row["verdict"] in ("wrong", "error", "crash")}
    assert not bad
