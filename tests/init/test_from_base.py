"""Starts that are not zero (PiSSA, MiLoRA, OLoRA, CorDA, LoRA-GA): the papers' factors, on a base that is not touched."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.calibrate import calibrate
from lorakit.core.chain import Chain

OUT, IN, R, ALPHA = 14, 10, 3, 7.5
S = ALPHA / R
SIZES = {
    "vocab_size": 48,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FROM_BASE = sorted(name for name in lk.INITS if vars(lk.INITS.module(name)).get("FROM_BASE"))


class Problem:
    """One layer, data, a loss. In float64, the starts are the closed forms to rounding."""

    def __init__(
        self, init: str, dtype: torch.dtype = torch.float64, *, attach: bool = True, alpha: float = ALPHA
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
        self.x, self.y = (
            torch.randn(50, IN, dtype=dtype) @ torch.randn(IN, IN, dtype=dtype),
            torch.randn(50, OUT, dtype=dtype),
        )
        self.W = self.model[0].weight.detach().clone()
        self.base = copy.deepcopy(self.model)
        self.method = lk.LoRA(r=R, alpha=alpha, init=init)
        if attach:
            lk.attach(self.model, self.method, statistics=self.statistics())
            ((_, self.layer, self.adapter),) = lk.adapters(self.model)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x, y = batch or (self.x, self.y)
        return (model(x) - y).square().mean()

    def statistics(self) -> dict:
        wanted = vars(lk.INITS.module(self.method.init)).get("NEEDS")
        return calibrate(self.model, self.method, [(self.x, self.y)], self.loss) if wanted else {}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return tuple(f.detach() for f in self.adapter.factors())

    @property
    def change(self) -> Tensor:
        """s·B·A of the live factors."""
        A, B = self.factors
        return S * B @ A


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_all_are_here() -> None:
    assert set(FROM_BASE) == {"pissa", "pissa_fast", "milora", "olora", "corda", "corda_kpm", "lora_ga"}


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_at_the_start_the_model_is_the_base_bit_for_bit(init: str, dtype: torch.dtype) -> None:
    p = Problem(init, dtype)
    assert torch.equal(p.model.eval()(p.x), p.base(p.x))
    assert torch.equal(p.layer.weight, p.W)
    assert p.change.norm() > 0.05
    assert isinstance(p.adapter, Chain)
    assert torch.count_nonzero(p.adapter.delta_weight()) == 0


@pytest.mark.parametrize("init", FROM_BASE)
def test_training_is_that_of_the_papers_form(init: str) -> None:
    """The papers put W - s·B·A in the base's place and start from A and B: the same gradients at every step."""
    p = Problem(init)
    A, B = (f.clone().requires_grad_() for f in p.factors)
    residual = p.W - p.change
    ours = torch.optim.SGD([q for q in p.model.parameters() if q.requires_grad], lr=0.05)
    theirs = torch.optim.SGD([A, B], lr=0.05)
    for _ in range(4):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        p.loss(p.model).backward()
        out = p.x @ (residual + S * B @ A).T + p.base[0].bias
        (out - p.y).square().mean().backward()
        close(p.adapter.live.lora_A.grad, A.grad)
        close(p.adapter.live.lora_B.grad, B.grad)
        assert A.grad.norm() > 1e-4 < B.grad.norm()
        ours.step()
        theirs.step()
    close(p.model(p.x), p.x @ (residual + S * B @ A).T + p.base[0].bias)
    assert (p.model(p.x) - p.base(p.x)).norm() > 1e-3
    assert torch.equal(p.layer.weight, p.W)


def test_pissa_takes_the_principal_part_and_leaves_the_rest() -> None:
    p = Problem("pissa")
    U, sigma, Vh = torch.linalg.svd(p.W, full_matrices=False)
    close(p.change, (U[:, :R] * sigma[:R]) @ Vh[:R])
    close(torch.linalg.svdvals(p.W - p.change)[: IN - R], sigma[R:])
    A, B = p.factors
    close(B.T @ B, A @ A.T)  # half of each singular value in either factor
    close(B.T @ B, torch.diag(sigma[:R] / S))


def test_fast_pissa_is_pissa_where_the_spectrum_decays() -> None:
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(60, 60).double())[0], torch.linalg.qr(torch.randn(40, 40).double())[0]
    W = (U[:, :40] * 0.8 ** torch.arange(40)) @ V.T
    changes = {}
    for init in ("pissa", "pissa_fast"):
        model = nn.Sequential(nn.Linear(40, 60, bias=False)).double()
        model[0].weight.data.copy_(W)
        lk.attach(model, lk.LoRA(r=4, init=init))
        ((_, _, adapter),) = lk.adapters(model)
        changes[init] = adapter.live.delta_weight().detach()
    close(changes["pissa_fast"], changes["pissa"], 1e-6)
    assert not torch.equal(changes["pissa_fast"], changes["pissa"])


def test_milora_takes_the_minor_part() -> None:
    p = Problem("milora")
    U, sigma, Vh = torch.linalg.svd(p.W, full_matrices=False)
    close(p.change, (U[:, -R:] * sigma[-R:]) @ Vh[-R:])
    close(torch.linalg.svdvals(p.W - p.change)[: IN - R], sigma[:-R])


def test_olora_has_orthonormal_columns() -> None:
    p = Problem("olora")
    A, B = p.factors
    close(B.T @ B, torch.eye(R).double())
    close(A, A.triu())
    close(B @ A[:, :R], p.W[:, :R])  # the first r columns of W lie in the span of B
    close(B @ A, B @ B.T @ p.W)


@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
def test_corda_splits_the_weight_as_seen_by_the_inputs(init: str) -> None:
    """W C = U S V^T: with C^-1 taken off again, all terms together are W; the r largest (or smallest) ones are the start."""
    p = Problem(init)
    C = p.x.T @ p.x / len(p.x)
    C = C / C.diagonal().mean() + 0.01 * torch.eye(IN).double()
    U, sigma, Vh = torch.linalg.svd(p.W @ C, full_matrices=False)
    close((U * sigma) @ Vh @ torch.linalg.inv(C), p.W)
    kept = slice(0, R) if init == "corda" else slice(-R, None)
    close(p.change @ C, (U[:, kept] * sigma[kept]) @ Vh[kept])
    left = sigma[R:] if init == "corda" else sigma[:-R]
    close(torch.linalg.svdvals((p.W - p.change) @ C)[: IN - R], left)
    _, B = p.factors
    close(B.T @ B, torch.diag(sigma[kept] / S))


def test_corda_damps_until_the_inverse_is_accurate() -> None:
    """Inputs in a plane, in fp32: C has rank 2, and only the damping makes it invertible."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 30)), torch.randn(64, 2) @ torch.randn(2, 40)
    method = lk.LoRA(r=2, init="corda")
    statistics = calibrate(model, method, [x], lambda model, x: model(x).mean())
    lk.attach(model, method, statistics=statistics)
    ((_, layer, adapter),) = lk.adapters(model)
    start = adapter.live.delta_weight()
    assert torch.isfinite(start).all()
    inside = x.T @ torch.linalg.pinv(x.T)  # what W does to such inputs is all in the two directions
    assert ((layer.weight - start) @ inside).norm() < 0.05 * (layer.weight @ inside).norm()


def test_c9_lora_ga_steps_along_the_best_approximation_of_the_gradient() -> None:
    p = Problem("lora_ga")
    residual = (p.x @ p.W.T + p.base[0].bias - p.y) * 2 / p.y.numel()
    G = residual.T @ p.x
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, : 2 * R] * sigma[: 2 * R]) @ Vh[: 2 * R]
    A, B = p.factors
    c2 = OUT**0.5 / 16
    close(A @ A.T, c2 * torch.eye(R).double())
    close(B.T @ B, c2 * torch.eye(R).double())
    close(G @ A.T @ A + B @ B.T @ G, c2 * best)
    lr = 1e-7
    p.loss(p.model).backward()
    torch.optim.SGD([q for q in p.model.parameters() if q.requires_grad], lr=lr).step()
    close(p.adapter.delta_weight().detach() / lr, -(S**2) * c2 * best, 1e-5)


def test_lora_ga_sketches_large_gradients_accurately() -> None:
    torch.manual_seed(0)
    leading = lk.INITS.module("lora_ga").leading
    U, V = torch.linalg.qr(torch.randn(90, 90))[0], torch.linalg.qr(torch.randn(80, 80))[0]
    G = (U[:, :80] * 0.7 ** torch.arange(80)) @ V.T
    left, right = leading(G, 6)
    close((left.T @ U[:, :6]).abs(), torch.eye(6), 1e-3)
    close((right @ V[:, :6]).abs(), torch.eye(6), 1e-3)


@pytest.mark.parametrize(
    ("init", "most"), [("pissa", IN), ("milora", IN), ("olora", IN), ("corda", IN), ("lora_ga", IN // 2)]
)
def test_a_rank_that_a_layer_does_not_have_is_refused(init: str, most: int) -> None:
    p = Problem(init, attach=False)
    p.method = lk.LoRA(r=most + 1, init=init)
    with pytest.raises(lk.LorakitError, match=f"no more than {most} directions") as raised:
        lk.attach(p.model, p.method, statistics=p.statistics())
    assert raised.value.where == "layer 0"
    assert lk.names(p.model) == []
    p.method = lk.LoRA(r=most, init=init)
    assert torch.equal(lk.attach(p.model, p.method, statistics=p.statistics()).eval()(p.x), p.base(p.x))


@pytest.mark.parametrize("init", ["corda", "corda_kpm", "lora_ga", "eva", "loftq"])
def test_missing_measurements_are_named(init: str) -> None:
    p = Problem(init, attach=False)
    with pytest.raises(lk.LorakitError, match="was not measured") as raised:
        lk.attach(p.model, p.method)
    assert "statistics=" in (raised.value.fix or "")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT
@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("parts", [["c_attn.q", "c_attn.v"], ["c_attn"]])
def test_trained_and_saved_it_is_one_lora_of_twice_the_rank(init: str, parts: list[str], tmp_path: Path) -> None:
    """On the untouched base, here and in PEFT, also for the parts of a fused projection in GPT-2's transposed layers."""
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**SIZES)).eval()

    model, ids = build(), torch.arange(24).reshape(2, 12)
    targets, method = [*parts, "c_fc"], lk.LoRA(r=2, alpha=3, init=init)
    statistics = calibrate(model, method, [ids], lambda model, ids: model(ids, labels=ids).loss, target_modules=targets)
    before = model(ids).logits
    lk.attach(model, method, target_modules=targets, statistics=statistics)
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    trained = model(ids).logits
    assert (trained - before).abs().max() > 1e-2
    lk.save(model, tmp_path)
    close(lk.load(build(), tmp_path)(ids).logits, trained, 1e-5)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    ranks = {len(m.lora_A["default"].weight) for m in theirs.modules() if "lora_A" in dict(m.named_children())}
    assert ranks == {4, 4 * len(parts)}  # c_fc, and c_attn with its parts in one
    close(theirs(ids).logits, trained, 1e-5)


def test_dropout_falls_on_the_live_factors_only() -> None:
    """As in the papers' form, where the base weight holds minus the start: in training they cancel only on average."""
    p = Problem("pissa", torch.bfloat16, attach=False)
    lk.attach(p.model, lk.LoRA(r=R, init="pissa", dropout=0.5))
    p.model.eval()
    assert torch.equal(p.model(p.x), p.base(p.x))
    p.model.train()
    assert not torch.equal(p.model(p.x), p.base(p.x))


@pytest.mark.parametrize("init", [*FROM_BASE, "eva", "loftq"])
def test_a_skeleton_without_data_can_be_planned_with(init: str) -> None:
    """Counts and shapes are there before anything is measured: those of the live factors and of what is taken off again."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    counted = lk.summary(lk.attach(model, lk.LoRA(r=R, init=init)))
    own = R * (IN + OUT)
    assert (counted.trainable, counted.adapter) == (own, 2 * own if init in FROM_BASE else own)


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("name", [name for name in lk.METHODS if "init" in lk.METHODS[name].__dataclass_fields__])
def test_every_method_with_an_init_starts_at_the_base_or_refuses(name: str, init: str) -> None:
    p = Problem(init, attach=False)
    try:
        method = lk.METHODS[name](r=R, init=init)
        lk.attach(p.model, method, statistics=p.statistics())
    except lk.LorakitError as error:
        assert init in str(error) or "init" in str(error)
        assert lk.names(p.model) == []
        return
    close(p.model(p.x), p.base(p.x))
