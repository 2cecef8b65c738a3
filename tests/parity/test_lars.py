"""LARS steps follow PyTorch code: timm's optimizer, and the linear-probing rule written out."""

import jax
import numpy as np
import optax
import pytest
from parity_models import import_timm

from mae_jax.train import optimizers

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
import_timm()
timm_optim = pytest.importorskip("timm.optim")

STEPS, FEATURES, CLASSES, BATCH = 12, 20, 5, 32
SCHEDULE = {
    "base_lr": 40.0,
    "batch_size": 64,
    "warmup_steps": 4,
    "total_steps": STEPS,
    "min_lr": 0.5,
}
MOMENTUM, TRUST = 0.9, 0.001


def problem():
    """Initial kernel [FEATURES, CLASSES] and bias, and a batch of features and labels a step."""
    rng = np.random.default_rng(0)
    kernel = 0.01 * rng.standard_normal((FEATURES, CLASSES)).astype(np.float32)
    centres = rng.standard_normal((CLASSES, FEATURES))
    labels = rng.integers(0, CLASSES, (STEPS, BATCH))
    features = centres[labels] + 0.5 * rng.standard_normal((STEPS, BATCH, FEATURES))
    return kernel, np.zeros(CLASSES, np.float32), features.astype(np.float32), labels


def our_steps(weight_decay):
    """Kernel [in, out] and bias after every step."""
    kernel, bias, features, labels = problem()
    optimizer = optimizers.lars(
        optimizers.warmup_then("cosine", **SCHEDULE),
        optimizers.decays,
        momentum=MOMENTUM,
        trust=TRUST,
        weight_decay=weight_decay,
    )

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = x @ params["kernel"] + params["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": kernel, "bias": bias}
    state = optimizer.init(params)
    for x, y in zip(features, labels, strict=True):
        params, state = step(params, state, x, y)
        yield np.asarray(params["kernel"]), np.asarray(params["bias"])


def their_steps(update):
    """As `our_steps`; `update(weight, bias, rate)` changes the two in place by their gradients."""
    kernel, bias, features, labels = problem()
    weight = torch.tensor(kernel.T.copy(), requires_grad=True)  # [out, in]
    bias = torch.tensor(bias, requires_grad=True)
    schedule = optimizers.warmup_then("cosine", **SCHEDULE)
    for i, (x, y) in enumerate(zip(features, labels, strict=True)):
        logits = torch.nn.functional.linear(torch.tensor(x), weight, bias)
        weight.grad, bias.grad = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, torch.tensor(y)), (weight, bias)
        )
        update(weight, bias, float(schedule(i)))
        yield weight.detach().numpy().T.copy(), bias.detach().numpy().copy()


def assert_steps_agree(ours, theirs):
    start = problem()[0]
    for got, expected in zip(ours, theirs, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(got[0] - start).max() > 0.005  # half of what the weights are


def test_steps_without_decay_are_those_of_timms_lars():
    optimizer = None

    def update(weight, bias, rate):
        nonlocal optimizer
        if optimizer is None:
            groups = [
                {"params": [weight], "always_adapt": True},
                {"params": [bias], "always_adapt": False},
            ]
            optimizer = timm_optim.Lars(groups, momentum=MOMENTUM, trust_coeff=TRUST, eps=0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    assert_steps_agree(our_steps(0.0), their_steps(update))


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_steps_are_those_of_the_rule_of_linear_probing(weight_decay):
    # timm divides by |gradient| + decay |weight|, this rule by |gradient + decay weight|.
    buffers = {}

    def update(weight, bias, rate):
        with torch.no_grad():
            for p in (weight, bias):
                step = p.grad.clone()
                if p.ndim > 1:
                    step += weight_decay * p
                    step *= TRUST * p.norm() / step.norm()
                buffers[p] = MOMENTUM * buffers.get(p, torch.zeros_like(p)) + step
                p -= rate * buffers[p]

    assert_steps_agree(our_steps(weight_decay), their_steps(update))
