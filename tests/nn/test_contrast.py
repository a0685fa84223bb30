from __future__ import annotations

import pytest
import torch

from maefast.nn.contrast import info_nce, nt_xent, sup_con


def rows(count=5, width=7):
    generator = torch.Generator().manual_seed(3)
    make = lambda: torch.randn(count, width, dtype=torch.double, generator=generator).requires_grad_()  # noqa: E731
    return make(), make()


def cosine(x, y):
    return float(x @ y / x.norm() / y.norm())


def test_info_nce_is_a_loop():
    a, b = rows()
    want = 0.0
    for one, other in ((a.detach(), b.detach()), (b.detach(), a.detach())):
        for i, row in enumerate(one):
            all_of_them = torch.tensor([cosine(row, y) / 0.2 for y in other], dtype=torch.double)
            want -= float(all_of_them.log_softmax(0)[i]) / (2 * len(a))
    assert info_nce(a, b, 0.2).item() == pytest.approx(want, rel=1e-12)


def test_nt_xent_is_a_loop():
    a, b = rows()
    both, want = [*a.detach(), *b.detach()], 0.0
    for i, row in enumerate(both):
        others = [j for j in range(10) if j != i]
        scores = torch.tensor([cosine(row, both[j]) / 0.2 for j in others], dtype=torch.double)
        want -= float(scores.log_softmax(0)[others.index((i + 5) % 10)]) / 10
    assert nt_xent(a, b, 0.2).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_gradients_and_types(loss):
    a, b = rows(3, 4)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, 0.5), (a, b))
    low = loss(a.bfloat16(), b.float())
    assert low.dtype is torch.float32
    torch.testing.assert_close(low.double(), loss(a, b), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(a.bfloat16(), b.float()), low)


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_bad_input(loss):
    a, b = rows()
    with pytest.raises(ValueError, match="same shape"):
        loss(a, b[:2])
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(a, b, 0.0)
    with pytest.raises(ValueError, match="a must"):
        loss(a[0], b)
    with pytest.raises(TypeError, match="b must"):
        loss(a, b.long())


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1], [[0, 1, 0, 2, 1], [3, 3, 3, 1, 0]]])
def test_sup_con_is_a_loop(labels):
    x, each = torch.stack(rows()).detach(), []
    labels = torch.tensor(labels)
    for set_of_rows, own in zip(x, labels.expand(2, 5).tolist()):
        for i, row in enumerate(set_of_rows):
            others = [j for j in range(5) if j != i]
            partners = [place for place, j in enumerate(others) if own[j] == own[i]]
            scores = torch.tensor([cosine(row, set_of_rows[j]) / 0.2 for j in others], dtype=torch.double)
            if partners:
                each.append(-float(scores.log_softmax(0)[partners].mean()))
    assert sup_con(x, labels, 0.2).item() == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_sup_con_of_pairs_is_nt_xent():
    a, b = rows()
    both = torch.cat([a, b])
    torch.testing.assert_close(sup_con(both, torch.arange(10) % 5, 0.3), nt_xent(a, b, 0.3), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: sup_con(x, torch.tensor([0, 1, 0, 2, 1]), 0.5), a)
    alone = sup_con(a, torch.arange(5))
    assert alone == 0
    alone.backward()
    assert not a.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert sup_con(a.detach().bfloat16(), torch.zeros(5, dtype=torch.long)).dtype is torch.float32


def test_sup_con_with_bad_input():
    a, _ = rows()
    with pytest.raises(ValueError, match="labels must be"):
        sup_con(a, torch.arange(4))
    with pytest.raises(TypeError, match="labels must be integers"):
        sup_con(a, torch.zeros(5))
    with pytest.raises(ValueError, match="temperature must be positive"):
        sup_con(a, torch.arange(5), -1.0)
