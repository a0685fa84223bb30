"""What every family of the drop-in must keep: `DropIn`, subclassed by each test file."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import maefast
from tests.budget import examples
from tests.integrations import sweep


def tensors(out) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def relative(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def gradient_error(got: nn.Module, want: nn.Module) -> float:
    """Of all gradients together; each must exist in both or in neither."""
    pairs = []
    for (name, p), (_, q) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"{name}: gradient in one of the two only"
        if p.grad is not None:
            pairs.append((p.grad.double().flatten(), q.grad.double().flatten()))
    assert pairs
    mine, theirs = (torch.cat(side) for side in zip(*pairs))
    # Every gradient by itself too, measured by the largest, because some are zero but for rounding.
    scale = max(b.norm().item() for _, b in pairs)
    each = max((a - b).norm().item() for a, b in pairs) / scale
    return max(relative(mine, theirs), each)


def both(models, *args, seed=3, **kwargs) -> list:
    """What each model returns from the same random state."""
    outs = []
    for model in models:
        torch.manual_seed(seed)
        outs.append(model(*args, **kwargs))
    return outs


def agree(want, got, tolerance=2e-5) -> None:
    """Equal outputs, up to rounding."""
    assert type(want) is type(got)
    want, got = tensors(want), tensors(got)
    assert len(want) == len(got)
    for a, b in zip(want, got):
        assert a.shape == b.shape
        assert a.dtype is b.dtype
        assert relative(b, a) < tolerance


class Drawing(nn.Module):
    """A parametrization: another weight at every reading, so that one more is seen. (Spectral norm advances by it.)"""

    def forward(self, weight):
        return weight * (torch.rand_like(weight) < 0.8)


class DropIn:
    """Subclass as ``class TestX(DropIn)``.

    make() builds a small float32 model (in train mode, dropout off), the same for the same torch seed. inputs(dtype)
    gives the arguments of a call, (args, kwargs). loss(out) is the scalar that is trained, from what the model returns.
    `options` go to accelerate, `families` is what the report must name, `replaced` the number of notes at least.
    """

    options: ClassVar[dict] = {}
    families: tuple[str, ...] = ()
    replaced = 1
    compiles = True
    double = 1e-10  # float64: relative error of outputs; gradients 10 times that
    single = 2e-5  # float32, the same
    bf16_slack = 1.5  # error in bfloat16 autocast, over the model's own against float32
    sweeps = False  # every method and attribute is changed; for one class of a family

    def make(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype) -> tuple[tuple, dict]:
        raise NotImplementedError

    def loss(self, out) -> Tensor:
        raise NotImplementedError

    # --- helpers --------------------------------------------------------------------------------------------

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().to(dtype)
        # Many start at zero (mask tokens, biases), where errors do not show.
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        return model

    def accelerate(self, model: nn.Module) -> nn.Module:
        return maefast.accelerate(model, **self.options)

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        """(as it was, accelerated) with equal weights."""
        model = self.build(dtype)
        return model, self.accelerate(copy.deepcopy(model))

    def call(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 1, cast: torch.dtype | None = None
    ):
        """On inputs of this dtype, the same each time; floating ones are handed over as `cast`, if that is given."""
        torch.manual_seed(2)
        args, kwargs = self.inputs(dtype)
        if cast is not None:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(cast) if t.is_floating_point() else t, (args, kwargs))
        device = next(model.parameters()).device
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        torch.manual_seed(seed)
        return model(*args, **kwargs)

    def compare(self, dtype: torch.dtype, tolerance: float) -> None:
        model, fast = self.pair(dtype)
        want, got = self.call(model, dtype), self.call(fast, dtype)
        assert type(want) is type(got)
        assert len(tensors(want)) == len(tensors(got))
        for a, b in zip(tensors(got), tensors(want)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, b) < tolerance
        self.loss(want).backward()
        self.loss(got).backward()
        assert gradient_error(fast, model) < 10 * tolerance

    # --- tests ----------------------------------------------------------------------------------------------

    def test_report(self):
        model = self.accelerate(self.build())
        report = maefast.report(model)
        assert set(self.families) <= set(report.families)
        assert len(report.replaced) >= self.replaced
        assert not report.kept, str(report)
        assert "agree" in str(report)

    def test_float64(self):
        self.compare(torch.float64, self.double)

    def test_float32(self):
        self.compare(torch.float32, self.single)

    def test_bfloat16(self):
        """Not further from float32 than the model's own code is, up to chance."""
        exact = self.loss(self.call(self.build()))
        model, fast = self.pair()
        with torch.autocast("cpu", torch.bfloat16):
            want, got = self.call(model), self.call(fast)
        for a, b in zip(tensors(got), tensors(want)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        truth = self.build()
        reference = self.call(truth)
        for a, b, t in zip(tensors(got), tensors(want), tensors(reference)):
            assert relative(a, t) <= self.bf16_slack * relative(b, t) + 2e-3
        for out in (want, got, reference):
            self.loss(out).backward()
        assert gradient_error(fast, truth) <= self.bf16_slack * gradient_error(model, truth) + 2e-3
        assert exact.isfinite()

    def test_bfloat16_weights(self):
        """A model that is bfloat16 as a whole: same dtypes, no further from the truth than its own code."""
        model, fast = self.pair(torch.bfloat16)
        truth = copy.deepcopy(model).float()
        want, got = self.call(model, torch.bfloat16), self.call(fast, torch.bfloat16)
        exact = self.call(truth, torch.bfloat16, cast=torch.float32)
        for a, b, t in zip(tensors(got), tensors(want), tensors(exact), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, t) <= self.bf16_slack * relative(b, t) + 2e-2
        for out in (want, got, exact):
            self.loss(out).backward()
        assert gradient_error(fast, truth) <= self.bf16_slack * gradient_error(model, truth) + 2e-2

    def test_random_numbers(self):
        model, fast = self.pair()
        states = []
        for net in (model, fast):
            self.call(net)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_50_steps(self):
        """A seeded run gives the same losses."""
        curves = []
        for net in self.pair():
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
            torch.manual_seed(3)
            losses = []
            for step in range(50):
                loss = self.loss(self.call(net, seed=step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            curves.append(torch.tensor(losses))
        assert curves[0][-1] < curves[0][0]
        assert torch.allclose(*curves, rtol=2e-3, atol=1e-5), (curves[0] - curves[1]).abs().max()

    def test_checkpoints(self):
        """Saved before, loaded after, and the other way round."""
        model, fast = self.pair()
        assert list(model.state_dict()) == list(fast.state_dict())
        torch.manual_seed(9)
        other = {k: torch.randn_like(v) * 0.05 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        fast.load_state_dict(other)
        model.load_state_dict(copy.deepcopy(fast.state_dict()))
        for a, b in zip(tensors(self.call(fast)), tensors(self.call(model))):
            assert relative(a, b) < 10 * self.single
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in fast.named_parameters()]

    def test_restore(self):
        model = self.build()
        kinds = [type(m) for m in model.modules()]
        state = [dict(vars(m)) for m in model.modules()]
        want = self.call(model)
        fast = self.accelerate(model)
        assert fast is model
        assert [type(m) for m in model.modules()] != kinds
        assert [type(m).__name__ for m in model.modules()] == [k.__name__ for k in kinds]
        assert all(isinstance(m, k) for m, k in zip(model.modules(), kinds))
        assert maefast.restore(model) is model
        assert [type(m) for m in model.modules()] == kinds
        assert [set(vars(m)) for m in model.modules()] == [set(s) for s in state]
        for a, b in zip(tensors(self.call(model)), tensors(want)):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="not accelerated"):
            maefast.report(model)

    def test_copies(self):
        """deepcopy (EMA) and pickling keep the model accelerated, and apart."""
        fast = self.accelerate(self.build())
        want = tensors(self.call(fast))
        copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
        with torch.no_grad():
            for p in fast.parameters():
                p.zero_()
        for other in copies:
            assert [type(m) for m in other.modules()] == [type(m) for m in fast.modules()]
            assert all(torch.equal(a, b) for a, b in zip(tensors(self.call(other)), want))

    def test_eval(self):
        model, fast = self.pair()
        model.eval()
        assert fast.eval() is fast
        assert not any(m.training for m in fast.modules())
        with torch.no_grad():
            for a, b in zip(tensors(self.call(fast)), tensors(self.call(model))):
                assert relative(a, b) < self.single
        with torch.inference_mode():
            assert self.loss(self.call(fast)).isfinite()

    def test_twice(self):
        """Accelerating again changes nothing."""
        fast = self.accelerate(self.build())
        kinds = [type(m) for m in fast.modules()]
        assert [type(m) for m in self.accelerate(fast).modules()] == kinds

    def test_compile(self):
        if not self.compiles:
            pytest.skip("the model's own code does not compile either")
        torch._dynamo.reset()
        model, fast = self.pair()
        compiled = torch.compile(fast, backend="aot_eager")
        want, got = self.call(model), self.call(compiled)
        for a, b in zip(tensors(got), tensors(want)):
            assert relative(a, b) < self.single
        self.loss(want).backward()
        self.loss(got).backward()
        assert gradient_error(fast, model) < 10 * self.single

    @pytest.mark.gpu
    def test_cuda(self, monkeypatch):
        """float32 without TF32, bfloat16 autocast as on a CPU, and the same bits twice."""
        for flags in (torch.backends.cuda.matmul, torch.backends.cudnn):
            monkeypatch.setattr(flags, "allow_tf32", False)
        model = self.build().cuda()
        fast = self.accelerate(copy.deepcopy(model))
        assert not maefast.report(fast).kept, str(maefast.report(fast))
        want, got, again = self.call(model), self.call(fast), self.call(fast)
        for a, b, c in zip(tensors(got), tensors(want), tensors(again), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, b) < 10 * self.single
            assert torch.equal(a, c)
        self.loss(want).backward()
        self.loss(got).backward()
        assert gradient_error(fast, model) < 100 * self.single
        with torch.autocast("cuda", torch.bfloat16):
            half, theirs = self.call(fast), self.call(model)
        for a, b, t in zip(tensors(half), tensors(theirs), tensors(want), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, t) <= self.bf16_slack * relative(b, t) + 2e-3

    def test_hooks(self):
        """A hook on a norm outside of the blocks sees what it saw."""
        model, fast = self.pair()
        norms = [name for name, m in model.named_modules() if type(m) is nn.LayerNorm and ".0." not in name]
        for name in norms[-3:]:
            seen = []

            def look(module, args, out, seen=seen):
                seen.append(out)

            handles = [net.get_submodule(name).register_forward_hook(look) for net in (model, fast)]
            self.call(model)
            half = len(seen)
            self.call(fast)
            for handle in handles:
                handle.remove()
            assert len(seen) == 2 * half, name
            for a, b in zip(seen[half:], seen[:half]):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                assert relative(a, b) < 10 * self.single, name

    def test_no_activations_stay(self):
        """Neither of the comparison nor of a step."""

        def living() -> dict[int, Tensor]:
            gc.collect()
            return {id(t): t for t in gc.get_objects() if type(t) is Tensor and t.requires_grad and t.ndim}

        model, before = self.build(), living()
        fast = self.accelerate(model)
        assert not living().keys() - before.keys()
        self.loss(self.call(fast)).backward()
        assert not living().keys() - before.keys()

    def test_unverified(self):
        fast = maefast.accelerate(self.build(), **self.options, verify=False)
        assert "verify=False" in str(maefast.report(fast))
        assert not maefast.report(fast).kept

    # --- what somebody changes ------------------------------------------------------------------------------

    def step(self, model: nn.Module) -> tuple:
        """Outputs and gradients of one training step in float64."""
        random.seed(4)  # FCMAE draws there
        out = self.call(model, torch.float64)
        self.loss(out).backward()
        return (*tensors(out), *(p.grad for p in model.parameters()))

    def test_changes_afterwards(self):
        """Whatever is changed on an accelerated model, on object or class, changes its result as it does the model's
        own, or both refuse; and once it is changed back, the model runs fast again."""
        if not self.sweeps:
            pytest.skip("swept by another class of the family")
        model, fast = self.pair(torch.float64)
        wrong = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for change in sweep.changes(model):
                found = []
                for net in (model, fast):
                    with change.apply(net):
                        found.append(sweep.outcome(lambda net=net: self.step(net), net))
                if not sweep.alike(found[1], found[0], 1e-8):
                    wrong.append(change.name)
            assert not wrong, wrong
            before = self._as_it_was(fast)
            self.step(fast)
        assert self._as_it_was(fast) == before

    @staticmethod
    def _as_it_was(fast: nn.Module) -> str:
        runs = (note.runs for note in maefast.report(fast).notes)
        return "\n".join(text[text.find("as it was") :] for text in runs if "as it was" in text)

    def test_methods_changed_before(self):
        """A method that is another one, on object or class, when the model is accelerated. Every third of them, or all
        with MAEFAST_ALL_EXAMPLES=1."""
        if not self.sweeps:
            pytest.skip("swept by another class of the family")
        wrong = []
        every = sweep.changes(self.build(torch.float64))
        methods = [change for change in every if " = " not in change.name and " exchanged" not in change.name]
        for change in methods[:: examples(3, 1)]:
            model = self.build(torch.float64)
            with warnings.catch_warnings(), change.apply(model):
                warnings.simplefilter("ignore")
                want = sweep.outcome(lambda model=model: self.step(model), model)
                model.zero_grad()
                self.accelerate(model)
                got = sweep.outcome(lambda model=model: self.step(model), model)
            if not sweep.alike(got, want, 1e-8):
                wrong.append(change.name)
        assert not wrong, wrong

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_frozen(self, when):
        """Any subset of the parameters frozen, before or after: exactly the gradients of the model's own code."""
        model = self.build(torch.float64)
        fast = copy.deepcopy(model)
        if when == "after":
            self.accelerate(fast)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for p, q in zip(model.parameters(), fast.parameters()):
                frozen = torch.rand((), generator=generator) < 0.5
                p.requires_grad_(not frozen)
                q.requires_grad_(not frozen)
                p.grad = q.grad = None
            if when == "before":
                self.accelerate(fast)
            for net in (model, fast):
                out = self.call(net, torch.float64)
                if self.loss(out).requires_grad:
                    self.loss(out).backward()
            assert gradient_error(fast, model) < 10 * self.double

    # --- what the model's own code takes --------------------------------------------------------------------

    def test_outputs_written_in_place(self):
        """Before the backward, as for logging; the loss is computed already."""
        models = self.pair(torch.float64)
        outputs = tensors(self.call(models[0], torch.float64))
        for i in (i for i, t in enumerate(outputs) if t.ndim and t.is_floating_point()):
            found = []
            for net in models:

                def run(net=net, i=i):
                    out = self.call(net, torch.float64)
                    loss = self.loss(out)
                    tensors(out)[i].detach().mul_(2)
                    loss.backward()
                    return tuple(p.grad for p in net.parameters())

                found.append(sweep.outcome(run, net))
            want, got = found
            good = isinstance(want, Exception) or sweep.alike(got, want, 1e-8)
            assert good, f"output {i}: {got if isinstance(got, Exception) else 'other gradients'}"

    @pytest.mark.parametrize("frozen", [False, True])
    def test_inputs_written_in_place(self, frozen):
        """Before the backward, as by the next batch in the same buffer; wherever the model's own code allows it, as it
        does at the latest with a frozen patch embedding."""
        found = []
        for net in self.pair(torch.float64):
            conv = next((part for part in net.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))), None)
            if frozen and conv is not None:
                conv.requires_grad_(False)

            def run(net=net):
                torch.manual_seed(2)
                args, kwargs = self.inputs(torch.float64)
                torch.manual_seed(1)
                random.seed(4)  # FCMAE draws there
                loss = self.loss(net(*args, **kwargs))
                for t in tensors((args, kwargs)):
                    t.detach().zero_()
                loss.backward()
                return tuple(p.grad for p in net.parameters())

            found.append(sweep.outcome(run, net))
        want, got = found
        good = isinstance(want, Exception) or sweep.alike(got, want, 1e-8)
        assert good, got if isinstance(got, Exception) else "other gradients"

    def test_empty_batch(self):
        """The model's own answer (empty, or NaN) or refusal."""
        torch.manual_seed(2)
        given = tree_map_only(Tensor, lambda t: t[:0], self.inputs(torch.float64))
        found = []
        for net in self.pair(torch.float64):
            found.append(sweep.outcome(lambda net=net: tuple(tensors(net(*given[0], **given[1]))), net))
        assert sweep.alike(found[1], found[0], 1e-8), [f for f in found if isinstance(f, Exception)]
