"""The watermarker: when it embeds, what it adds to the loss, and what it remembers."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradsigns_lightning import Cadence, MarginObjective, PaperObjective, StrengthSchedule, WatermarkKey
from gradsigns_lightning.core import EmbeddingSettings, EmbeddingState, Watermarker
from gradsigns_lightning.core.distributed import global_mean
from gradsigns_lightning.core.dose import OwnLength, TaskGradient, urgency
from gradsigns_lightning.core.signature import SignatureProjector, input_gradients

SHAPE = (1, 6, 6)
KEY = WatermarkKey.generate(
    "A", 8, input_shape=SHAPE, target_class=1, n_carriers=30, input_std=0.5, secret=bytes(32)
)


def make(key=KEY, **changes) -> Watermarker:
    arguments = {
        "strength": 1.0,
        "objective": "margin",
        "engine": "double_backward",
        "cadence": 4,
        "n_images": 5,
        "momentum": 0.0,
    }
    return Watermarker(key, EmbeddingSettings(**{**arguments, **changes}))


def network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Softplus(), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPE, generator=generator), torch.arange(n) % 3


def fed(task=1.0, **changes) -> Watermarker:
    """Return a watermarker that has seen a batch, and a task's gradient of length ``task``."""
    watermarker = make(**changes)
    watermarker.observe(*batch(), step=0)
    note(watermarker, task, step=0)
    return watermarker


def note(watermarker, *lengths, step):
    """Let the watermarker observe gradients of these lengths, one per optimizer."""
    for i, length in enumerate(lengths):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([0.6, 0.8]) * length
        watermarker.observe_gradients(i, [parameter], step=step)


def embed(watermarker, model, step=0, epoch=0):
    return watermarker.loss(model, model, step=step, epoch=epoch)


def due(watermarker, steps, epoch=0):
    return [s for s in steps if watermarker.is_due(step=s, epoch=epoch)]


def run(watermarker, model, steps, satisfied, missing=False):
    """Return the steps that embed if each has these findings."""
    taken = []
    for step in steps:
        if watermarker.is_due(step=step, epoch=0):
            embed(watermarker, model, step)
            watermarker.state = replace(
                watermarker.state, findings=torch.tensor([missing, satisfied, satisfied])
            )
            taken.append(step)
    return taken


# --- what it adds


def reference_loss(model, objective, images):
    """Return the objective of the mean raw-pixel gradient in evaluation mode, computed step by step."""
    rows = input_gradients(model.eval(), images, 1, create_graph=True).flatten(1) / 0.5
    rows = rows / rows.norm(dim=1, keepdim=True) if objective.of_directions else rows
    return objective(rows.mean(0)[KEY.carriers], SignatureProjector.from_key(KEY))


@pytest.mark.parametrize("objective", [MarginObjective(), PaperObjective()])
@pytest.mark.parametrize("n_images", [2, 5])
def test_the_loss_and_its_gradient_are_those_of_the_mean_over_target_images(objective, n_images):
    model = network()
    watermarker = fed(task=0.7, objective=objective, n_images=n_images, strength=3.0)
    loss = embed(watermarker, model)
    loss.backward()
    images, labels = batch()
    twin = network()
    expected = reference_loss(twin, objective, images[labels == 1][-n_images:])
    expected.backward()
    factor = 3.0 * 0.7 / length(twin)  # three times as long as the task's gradient
    torch.testing.assert_close(loss, factor * expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, factor * q.grad, atol=1e-5, rtol=1e-4)
    assert model[0].weight.grad.abs().sum() > 0
    assert model[5].weight.grad.abs().sum() > 0


def length(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()


def test_the_mark_is_made_of_nothing_that_batch_normalisation_takes_out_again():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)
    )
    embed(fed(), model).backward()
    assert model[0].bias.grad.abs().amax() < 1e-4 * model[0].weight.grad.abs().amax()


def test_activations_that_are_computed_again_follow_the_running_means_too():
    class Checkpointed(nn.Module):
        def __init__(self, *, again):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus())
            self.head, self.again = nn.Linear(64, 3), again

        def forward(self, x):
            x = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
            return self.head(x.flatten(1))

    model, twin = (Checkpointed(again=again) for again in (True, False))
    for network in (model, twin):
        embed(fed(), network).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("factor", [1e-2, 1.0, 128.0])
def test_a_scaled_task_has_a_mark_scaled_alike(factor):
    gradients = []
    for task in (1.0, factor):
        model = network()
        embed(fed(task=task, strength=0.5), model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert float(torch.cat([g.flatten() for g in gradients[0]]).norm()) == pytest.approx(0.5, rel=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(factor * one, other)


def test_several_optimizers_count_together():
    watermarker, model = fed(), network()
    note(watermarker, 3.0, 4.0, step=0)
    first = 0.9 * 1.0 + 0.1 * 3.0  # its second gradient; the other optimizer has had one
    embed(watermarker, model).backward()
    assert float(length(model)) == pytest.approx((first**2 + 4.0**2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
@pytest.mark.parametrize("when", ["first", "later"])
def test_steps_that_overflowed_or_were_empty_do_not_count(bad, when):
    watermarker, model = make(), network()
    watermarker.observe(*batch(), step=0)
    for task in (bad, 2.0) if when == "first" else (2.0, bad):
        note(watermarker, task, step=0)
    embed(watermarker, model).backward()
    assert float(length(model)) == pytest.approx(2.0, rel=1e-4)


def test_before_the_task_s_gradient_is_known_nothing_is_due():
    watermarker = make()
    watermarker.observe(*batch(), step=0)
    assert not watermarker.is_due(step=0, epoch=0)
    note(watermarker, 1.0, step=0)
    assert watermarker.is_due(step=1, epoch=0)


def test_the_mark_s_own_step_is_no_measure_of_the_task():
    watermarker, model = fed(), network()
    embed(watermarker, model, 1)
    note(watermarker, 99.0, step=1)
    embed(watermarker, model, 2).backward()
    assert float(length(model)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_no_graph_of_the_network_stays_in_memory_unless_parameters_are_sharded(sharded):
    model, watermarker = network(), fed()
    loss = watermarker.loss(model, model, step=0, epoch=0, sharded=sharded)
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name().split(".")[-1])
        nodes += [successor for successor, _ in node.next_functions if successor is not None]
    assert any("Convolution" in name for name in names) == sharded
    assert (
        names == {"NanToNumBackward0", "_DifferentiatedBackward", "torch::autograd::AccumulateGrad"}
    ) != sharded


def test_a_loss_that_was_not_used_leaves_no_trace():
    model, watermarker = network(), fed(momentum=0.5, cadence=4)
    embed(watermarker, model, 2)
    before = copy.deepcopy(watermarker.state_dict())
    assert watermarker.is_due(step=6, epoch=0)
    embed(watermarker, network(seed=1), 6)
    watermarker.roll_back()
    after = watermarker.state_dict()
    assert torch.equal(before.pop("mean_gradient"), after.pop("mean_gradient"))
    assert after == before
    assert watermarker.is_due(step=6, epoch=0)


def test_the_model_is_left_as_it_was():
    model = network()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    embed(fed(), model).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("objective", ["margin", "paper"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_target_images_the_loss_and_its_gradients_are_zero(objective, momentum):
    watermarker = make(objective=objective, momentum=momentum)
    images, labels = batch()
    watermarker.observe(images, torch.zeros_like(labels), step=0)
    note(watermarker, 1.0, step=0)
    model = network()
    loss = embed(watermarker, model)
    loss.backward()
    assert loss.item() == 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_a_model_that_cannot_take_blank_images_is_signed_from_a_half_full_buffer():
    class Normalizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    model = Normalizing()
    loss = embed(fed(n_images=20), model)
    loss.backward()
    assert loss.item() > 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_descending_the_loss_embeds_the_signature():
    model, watermarker = network(), fed(objective=MarginObjective(0.3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(80):
        optimizer.zero_grad()
        loss = embed(watermarker, model, step)
        loss.backward()
        optimizer.step()
    rows = input_gradients(model.eval(), watermarker.buffer.images[:3], 1).flatten(1)
    held = (rows / rows.norm(dim=1, keepdim=True)).mean(0)[KEY.carriers]
    bits = (KEY.projection.float() @ held > 0).to(torch.uint8)
    assert torch.equal(bits, KEY.signature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype):
    model = network().to(dtype)
    loss = embed(fed(), model)
    loss.backward()
    # half precision is computed in float32
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert bool(model[0].weight.grad.isfinite().all())


def test_momentum_holds_a_running_mean_but_differentiates_the_new_one():
    seen = []
    watermarker, model = make(momentum=0.75, objective=_Spy(seen)), network()
    for step in range(2):
        watermarker.observe(*batch(seed=step), step=step)
        note(watermarker, 1.0, step=step)
        embed(watermarker, model, step)
    plain = []
    for seed in range(2):
        images, labels = batch(seed=seed)
        plain.append(images[labels == 1])
    both = torch.cat([plain[1].flip(0), plain[0].flip(0)])[:5]
    model.eval()
    means = [input_gradients(model, x, 1).mean(0).flatten()[KEY.carriers] / 0.5 for x in (plain[0], both)]
    torch.testing.assert_close(seen[0].detach(), means[0])
    torch.testing.assert_close(seen[1].detach(), 0.75 * means[0] + 0.25 * means[1])
    assert seen[1].requires_grad


class _Spy:
    of_directions = False

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, carrier_gradient, projector):
        self.seen.append(carrier_gradient)
        return carrier_gradient.sum()

    def satisfied(self, carrier_gradient, projector):
        return torch.tensor(False)

    def check_key(self, key):
        pass


def test_the_projector_is_derived_once_for_a_device_and_dtype():
    watermarker = fed()
    first = watermarker.projector(torch.device("cpu"), torch.float32)
    assert watermarker.projector(torch.device("cpu"), torch.float32) is first
    assert watermarker.projector(torch.device("cpu"), torch.float64).signs.dtype == torch.float64


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_step_looks_at_the_batch_and_gives_the_loss_when_it_is_due(strength):
    model, watermarker, reference = network(), make(strength=strength, momentum=0.5), fed(momentum=0.5)
    settings = {"step": 0, "epoch": 0, "optimizers": [torch.optim.SGD(model.parameters(), 0.1)]}
    assert watermarker.step(model, model, *batch(), **settings) is None
    assert watermarker.is_prepared == (strength > 0)
    note(watermarker, 1.0, step=0)
    losses = [watermarker.step(model, model, *batch(), **settings | {"step": step}) for step in range(1, 6)]
    if strength == 0:
        assert losses == [None] * 5
        assert watermarker.buffer.images is None
        return
    reference.observe(*batch(), step=1)
    first = embed(reference, model, 1)
    assert [loss is None for loss in losses] == [False, True, True, True, False]
    assert torch.equal(losses[0], first)


def test_parameters_that_no_optimizer_steps_are_left_out_of_a_step():
    model, watermarker = network(), fed()
    optimizer = torch.optim.SGD(model[5].parameters(), 0.1)
    watermarker.step(model, model, *batch(), step=1, optimizers=[optimizer]).backward()
    assert model[0].weight.grad is None
    assert float(length(model)) == pytest.approx(1.0, rel=1e-4)
    assert model[0].weight.requires_grad


# --- when it embeds


def test_not_due_before_the_first_batch():
    assert not make().is_due(step=0, epoch=0)


def test_due_at_every_interval_while_bits_are_missing():
    assert run(fed(), network(), range(13), satisfied=False) == [0, 4, 8, 12]


def test_backs_off_while_satisfied():
    assert run(fed(cadence=Cadence(2, max_backoff=4)), network(), range(40), satisfied=True) == [
        0,
        4,
        12,
        20,
        28,
        36,
    ]


def test_falls_back_to_the_interval_when_a_margin_is_lost():
    watermarker, model = fed(cadence=Cadence(2, max_backoff=4)), network()
    run(watermarker, model, range(13), satisfied=True)
    assert run(watermarker, model, [20], satisfied=False) == [20]
    assert run(watermarker, model, range(21, 27), satisfied=False) == [22, 24, 26]


@pytest.mark.parametrize(("every", "window"), [(3, 5), (25, 5), (100, 10)])
def test_between_embedding_steps_only_the_last_batches_are_looked_at(every, window):
    watermarker, model = fed(cadence=Cadence(every), n_images=2), network()
    embed(watermarker, model, 10)
    kept = []
    for step in range(11, 11 + every):
        before = watermarker.buffer.images
        watermarker.observe(*batch(seed=step), step=step)
        kept.append(watermarker.buffer.images is not before)
    assert sum(kept) == min(window + 1, every)
    assert kept == sorted(kept), "the last ones, the embedding step's own batch among them"


def test_a_satisfied_objective_is_what_backs_off():
    class Satisfied(_Spy):
        def satisfied(self, carrier_gradient, projector):
            assert not carrier_gradient.requires_grad
            return torch.tensor(True)

    for objective, state in ((Satisfied([]), [False, True, True]), (_Spy([]), [False, True, False])):
        watermarker = fed(objective=objective)
        embed(watermarker, network(), 0)
        found = watermarker.state.findings.tolist()
        watermarker.state = replace(watermarker.state, findings=torch.tensor([False, True, found[2]]))
        assert watermarker.state.findings.tolist() == state
        assert due(watermarker, range(1, 9))[0] == (8 if state[2] else 4)


@pytest.mark.parametrize(
    ("margin", "smallest", "state"),
    [
        (0.5, 0.24, [True, False, False]),  # missing: below 0.5 of what was asked for
        (0.5, 0.26, [False, False, False]),
        (0.5, 0.36, [False, True, False]),  # safe: 0.7 of it
        (1.0, 0.69, [False, False, False]),
        (1.5, 0.76, [False, False, True]),  # ample: 0.7 in itself
        (0.5, -0.1, [True, False, False]),
    ],
)
def test_missing_safe_and_ample_margins(margin, smallest, state):
    margins = torch.tensor([2.0, smallest, 1.0])
    for satisfied in (False, True):
        found = EmbeddingState().having_found(margins, asked=margin, satisfied=torch.tensor(satisfied))
        assert found.findings.tolist() == [*state[:2], state[2] or satisfied]


def test_the_state_is_that_of_the_bits_themselves():
    watermarker, model = fed(objective=MarginObjective(0.3)), network()
    for step in range(60):
        embed(watermarker, model, step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad
                parameter.grad = None
        smallest = float(watermarker.state.margins.min())
        assert watermarker.state.findings.tolist() == [smallest < 0.15, smallest >= 0.21, smallest >= 0.3]
    assert smallest > 0.15


def test_hurries_while_bits_are_missing():
    watermarker = fed(cadence=Cadence(16, max_hurry=4))
    assert run(watermarker, network(), range(40), satisfied=False, missing=True) == [
        0,
        8,
        12,
        16,
        20,
        24,
        28,
        32,
        36,
    ]
    assert run(watermarker, network(), range(40, 100), satisfied=False) == [
        40,
        44,
        48,
        52,
        56,
        60,
        64,
        68,
        72,
        76,
        80,
        84,
        88,
        92,
        96,
    ]
    assert run(watermarker, network(), range(100, 140), satisfied=True)[:3] == [100, 108, 124]


@pytest.mark.parametrize(("n_missing", "times"), [(0, 1.0), (1, 2**0.75), (2, 4**0.75), (5, 4**0.75)])
def test_the_strength_grows_with_the_hurry(n_missing, times):
    watermarker, model = fed(cadence=Cadence(16, max_hurry=4), strength=3.0), network()
    for step in range(0, 16 * n_missing, 16):
        assert run(watermarker, model, [step], satisfied=False, missing=True)
    assert watermarker.is_due(step=100, epoch=0)  # finds what the last one left
    embed(watermarker, model, 100).backward()
    assert float(length(model)) == pytest.approx(3.0 * times, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "cadence", "share", "times"),
    [
        ("margin", Cadence.following(), -0.5, 8**0.75),
        ("margin", Cadence.following(), 0.3, 8**0.75),
        ("margin", Cadence.following(), 0.4, 8**0.375),
        ("margin", Cadence.following(), 0.5, 1.0),
        ("margin", Cadence.following(), 0.7, 1.0),
        ("margin", Cadence.following(), 0.85, 0.5),
        ("margin", Cadence.following(), 1.2, 0.0),
        ("paper", Cadence.following(), 1.2, 1.0),  # this objective asks for no margin
        ("margin", Cadence(80, max_hurry=8), 0.85, 8**0.75),
    ],
)
def test_the_dose_falls_with_what_is_missing(monkeypatch, objective, cadence, share, times):
    watermarker, model = fed(objective=objective, cadence=cadence, strength=3.0), network()
    with torch.no_grad():
        model[-1].bias[KEY.target_class] += 20  # it knows the class
    watermarker.state = replace(watermarker.state, first_step=0, last_step=1000, factor=1 / 8)
    monkeypatch.setattr(
        "gradsigns_lightning.core.embedding_pass.urgency",
        lambda *arguments, **found: urgency(*arguments, **found | {"share": torch.tensor(share)}),
    )
    embed(watermarker, model, 1010).backward()
    assert float(length(model)) == pytest.approx(3.0 * times, rel=1e-4)


def test_lengths_of_a_checkpoint_follow_the_training_to_its_device():
    parameter = torch.nn.Parameter(torch.ones(4, device="meta"))
    parameter.grad = torch.ones_like(parameter)
    task = TaskGradient.from_state_dict({0: 1.0, 1: 2.0}).noting(1, [parameter])
    assert task.length().device.type == "meta"


@pytest.mark.parametrize(("share", "own"), [(0.6, 2.0), (0.8, 1.0)])
def test_where_hardly_anything_is_missing_a_sharded_marks_length_is_not_followed(share, own):
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    task = TaskGradient().noting(0, [parameter])
    parameter.grad = torch.full((1,), 5.0)  # of task and mark together
    known = OwnLength().asking(torch.tensor(0.1)).following([parameter], task, torch.tensor(share))
    assert float(known.own) == own
    assert float(known.factor()) == pytest.approx(0.1 / own)


@pytest.mark.parametrize("engine", ["double_backward", "forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize(
    ("cadence", "confidence", "times"),
    [
        (Cadence.following(), -20, 0.4),  # two steps long, a fifth of the task's pull
        (Cadence.following(), 20, 1.0),
        (2, -20, 1.0),  # a fixed cadence has a fixed dose
    ],
)
def test_a_network_that_does_not_know_its_class_is_left_room_to_learn(engine, cadence, confidence, times):
    model = network()
    with torch.no_grad():
        model[-1].bias[KEY.target_class] += confidence
    watermarker = fed(cadence=cadence, strength=3.0, engine=engine)
    embed(watermarker, model).backward()
    assert float(length(model)) == pytest.approx(3.0 * times, rel=1e-4)
    assert float(watermarker.state.recognised) == pytest.approx(float(confidence > 0), abs=1e-3)
    assert int(watermarker.state.n_held_back) == (times < 1)


def test_recognition_is_the_mean_over_the_images_at_hand():
    model = network().eval()
    images, labels = batch()
    watermarker = fed()  # five slots, three of them without an image of their own
    assert int(watermarker.buffer.valid.sum()) < 5
    embed(watermarker, model)
    with torch.no_grad():
        expected = model(images)[labels == KEY.target_class].softmax(1)[:, KEY.target_class].mean()
    assert float(watermarker.state.recognised) == pytest.approx(float(expected), rel=1e-5)


def test_a_training_that_may_end_at_any_time_embeds_early_and_ever_less():
    watermarker = fed(cadence=Cadence.following())
    steps = run(watermarker, network(), range(3000), satisfied=False)
    intervals = [b - a for a, b in itertools.pairwise(steps)]
    assert intervals[0] == 2
    assert intervals == sorted(intervals)
    assert intervals[-1] == 80
    for so_far in (10, 100, 1000):
        assert max(i for s, i in zip(steps, intervals, strict=False) if s <= so_far) <= max(2, 0.08 * so_far)


@pytest.mark.parametrize("cadence", [4, Cadence.following()])
def test_the_steps_to_come_are_those_that_embed_while_bits_are_missing(cadence):
    watermarker = fed(cadence=cadence)
    assert list(watermarker.coming_steps()) == []
    model, before = network(), run(fed(cadence=cadence), network(), range(150), satisfied=False, missing=True)
    n = sum(step < 50 for step in before)
    assert run(watermarker, model, range(50), satisfied=False, missing=True) == before[:n]
    assert list(itertools.islice(watermarker.coming_steps(), len(before) - n)) == before[n:]
    assert watermarker.state.last_step == before[n - 1]


STEPPED = {
    "by turns": lambda i: [i % 2],
    "three by turns": lambda i: [i % 3],
    "together": lambda i: [0, 1],
    "one several times": lambda i: [0, 0, 0],
}


def trained(watermarker, model, batches, stepped):
    """Return the steps that embed, if a bit stays missing and optimizers ``stepped(i)`` step in batch i."""
    taken, parameter = [], nn.Parameter(torch.zeros(2))
    for i in batches:
        optimizers = stepped(i)
        step = i * len(optimizers)
        watermarker.observe(*batch(), step=step)
        if watermarker.is_due(step=step, epoch=0):
            embed(watermarker, model, step)
            watermarker._state = torch.tensor([True, False, False])
            taken.append(step)
        for n, optimizer in enumerate(optimizers):
            parameter.grad = torch.ones(2) * (1 + 100 * (n < len(set(optimizers)) and step in taken))
            watermarker.observe_gradients(optimizer, [parameter], step=step + n)
    return taken


@pytest.mark.parametrize("cadence", [2, 4, Cadence(5, max_hurry=2), Cadence.following()])
@pytest.mark.parametrize("stepped", STEPPED)
def test_with_several_optimizers_too_the_steps_to_come_are_those_that_embed(cadence, stepped):
    watermarker, stepped = make(cadence=cadence), STEPPED[stepped]
    model, before = network(), trained(make(cadence=cadence), network(), range(120), stepped)
    n = len(trained(watermarker, model, range(40), stepped))
    assert list(itertools.islice(watermarker.coming_steps(), len(before) - n)) == before[n:]
    assert watermarker.state.turns.left_out == []
    # The mark's own gradient, a hundred times as long here, is never mistaken for the task's.
    assert all(
        float(length) == pytest.approx(2**0.5)
        for length in watermarker.state.task_gradient.state_dict().values()
    )


def test_the_margins_of_the_first_and_last_embedding_step_are_kept():
    watermarker, model = fed(), network()
    assert watermarker.state.margins is watermarker.state.first_margins is None
    embed(watermarker, model, 0)
    first = watermarker.state.margins
    assert torch.equal(first, watermarker.state.first_margins)
    projector = SignatureProjector.from_key(KEY)
    images, valid = watermarker.buffer.images, watermarker.buffer.valid
    mean = input_gradients(model.eval(), images, 1).flatten(1)[valid] / 0.5
    mean = (mean / mean.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(first, projector.signs * projector.project(mean[KEY.carriers]), atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    embed(watermarker, model, 4)
    assert not torch.equal(watermarker.state.margins, first)
    last = watermarker.state.margins
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    embed(watermarker, model, 8)
    assert torch.equal(watermarker.state.margins, last)  # nothing is kept of a step that overflowed
    assert torch.equal(watermarker.state.first_margins, first)
    assert "margins" not in str(watermarker.state_dict().keys())
    watermarker.reset()
    assert watermarker.state.margins is watermarker.state.first_margins is None


def test_strength_zero_is_never_due():
    assert due(fed(strength=0), range(20)) == []


def test_not_due_before_the_start_epoch():
    watermarker = fed(strength=StrengthSchedule(1.0, start_epoch=2))
    assert [watermarker.is_due(step=9, epoch=e) for e in range(4)] == [False, False, True, True]


def test_warmup_counts_from_the_first_embedding_step():
    watermarker, model = fed(strength=StrengthSchedule(4.0, warmup_steps=3, start_epoch=1)), network()
    assert watermarker.strength_at(step=100, epoch=0) == 0
    assert watermarker.strength_at(step=100, epoch=1) == 1
    first = embed(watermarker, model, 100, epoch=1)
    assert [watermarker.strength_at(step=100 + s, epoch=1) for s in range(5)] == [1, 2, 3, 4, 4]
    torch.testing.assert_close(embed(watermarker, model, 103, epoch=1), 4 * first)


# --- what it remembers


@pytest.mark.parametrize("satisfied", [True, False])
def test_a_loaded_state_takes_the_same_decisions(satisfied):
    model = network()
    schedule = StrengthSchedule(1.0, warmup_steps=30)
    old = fed(cadence=Cadence(2, max_backoff=8), strength=schedule, momentum=0.5)
    run(old, model, range(7), satisfied=satisfied)
    state = old.state_dict()
    new = fed(cadence=Cadence(2, max_backoff=8), strength=schedule, momentum=0.5)
    new.load_state_dict(copy.deepcopy(state))
    assert [new.strength_at(step=s, epoch=0) for s in range(7, 40)] == [
        old.strength_at(step=s, epoch=0) for s in range(7, 40)
    ]
    torch.testing.assert_close(embed(new, model, 7), embed(old, model, 7))
    twin = fed(cadence=Cadence(2, max_backoff=8), strength=schedule, momentum=0.5)
    twin.load_state_dict(copy.deepcopy(new.state_dict()))
    assert run(twin, model, range(8, 40), satisfied) == run(new, model, range(8, 40), satisfied)


@pytest.mark.parametrize("field", ["first_step", "last_step", "factor", "task_gradient", "mean_gradient"])
def test_every_field_of_the_state_matters(field):
    def decisions(state):
        watermarker = fed(
            cadence=Cadence(2, max_backoff=8), strength=StrengthSchedule(1.0, warmup_steps=50), momentum=0.5
        )
        watermarker.load_state_dict(state)
        steps = due(watermarker, range(7, 30))
        note(watermarker, 1.0, step=29)
        return steps, embed(watermarker, network(), 29).item()

    old = fed(
        cadence=Cadence(2, max_backoff=8), strength=StrengthSchedule(1.0, warmup_steps=50), momentum=0.5
    )
    run(old, network(seed=1), range(7), satisfied=True)
    note(old, 5.0, step=8)
    # none exist without a last step
    state, fresh = old.state_dict(), make().state_dict() | {"first_step": 4}
    assert set(state) == set(fresh)
    assert decisions(copy.deepcopy(state)) == decisions(copy.deepcopy(state))
    assert decisions(copy.deepcopy(state)) != decisions({**copy.deepcopy(state), field: fresh[field]})


def test_the_state_is_plain_and_tells_nothing_about_the_key():
    watermarker = fed(momentum=0.5)
    embed(watermarker, network())
    state = watermarker.state_dict()
    assert {k: type(v) for k, v in state.items()} == {
        "first_step": int,
        "last_step": int,
        "factor": float,
        "task_gradient": dict,
        "mean_gradient": torch.Tensor,
    }
    assert state["task_gradient"] == {0: 1.0}
    assert state["mean_gradient"].shape == (math.prod(SHAPE),)
    assert not state["mean_gradient"].requires_grad


def test_a_saved_state_has_what_the_last_step_found():
    watermarker = fed(cadence=Cadence(2, max_backoff=4))
    run(watermarker, network(), [0], satisfied=True)
    assert watermarker.state_dict()["factor"] == 2


def looked_at(ask):
    """Return which of 40 batches' images are kept, and which embed, with a call after each."""
    watermarker, model = fed(cadence=Cadence(20, max_backoff=4)), network()
    run(watermarker, model, [0], satisfied=True)
    kept, embedded = [], []
    for step in range(1, 60):
        before = watermarker.buffer.images
        watermarker.observe(*batch(seed=step), step=step)
        kept += [step] if watermarker.buffer.images is not before else []
        embedded += run(watermarker, model, [step], satisfied=True)
        ask(watermarker, step)
    return kept, embedded


@pytest.mark.parametrize(
    "ask",
    [
        lambda watermarker, step: watermarker.state_dict(),
        lambda watermarker, step: [watermarker.is_due(step=s, epoch=0) for s in range(step, step + 100)],
        lambda watermarker, step: next(watermarker.coming_steps()),
        lambda watermarker, step: watermarker.strength_at(step=step, epoch=0),
    ],
    ids=["state_dict", "is_due", "coming_steps", "strength_at"],
)
def test_asking_changes_nothing(ask):
    assert looked_at(ask) == looked_at(lambda watermarker, step: None)


def test_what_the_last_step_found_is_read_once():
    class Counted(torch.Tensor):
        n_read = 0

        def tolist(self):
            Counted.n_read += 1
            return super().tolist()

    watermarker = fed(cadence=Cadence(4, max_backoff=4))
    embed(watermarker, network(), 0)
    watermarker.state = replace(
        watermarker.state, findings=torch.tensor([False, True, True]).as_subclass(Counted)
    )
    for step in range(1, 9):
        watermarker.observe(*batch(), step=step)
        assert watermarker.is_due(step=step, epoch=0) == (step == 8)
        assert Counted.n_read == (step >= 4), (
            "in the first step that may embed, by when the device has long computed it"
        )


def test_a_step_makes_a_new_state_and_leaves_the_old_one():
    watermarker, model = fed(momentum=0.5), network()
    embed(watermarker, model, 0)
    before = watermarker.state
    fields = copy.deepcopy(vars(before))
    watermarker.observe(*batch(seed=1), step=4)
    note(watermarker, 3.0, step=4)
    embed(watermarker, model, 4)
    after = vars(before)
    assert before is not watermarker.state
    assert watermarker.state.n_embedded == 2
    for name, value in fields.items():
        same = (
            torch.equal(value, after[name])
            if isinstance(value, torch.Tensor)
            else str(value) == str(after[name])
        )
        assert same, name
    watermarker.state = before
    assert watermarker.is_due(step=4, epoch=0)


def test_reset_forgets_everything():
    watermarker = fed(momentum=0.5)
    run(watermarker, network(), range(9), satisfied=True)
    watermarker.reset()
    assert watermarker.state_dict() == make().state_dict()
    assert not watermarker.is_due(step=0, epoch=0)


# --- what it refuses


@pytest.mark.parametrize("momentum", [0, 0.0, 0.5, 0.999])
def test_momentum_from_zero_below_one(momentum):
    assert make(momentum=momentum).settings.momentum == momentum


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, "`momentum` must be a finite number"),
        ({"momentum": math.nan}, ValueError, "`momentum`"),
        ({"momentum": "0"}, TypeError, "`momentum`"),
        ({"n_images": 0}, ValueError, "`n_images` must be an integer >= 1"),
        ({"cadence": 0}, ValueError, "`every_n_steps`"),
        ({"strength": -1}, ValueError, "`strength`"),
        ({"objective": "hinge"}, ValueError, "`objective`"),
        ({"objective": MarginObjective(3.0)}, ValueError, "`margin` must be at most"),
        ({"engine": "magic"}, ValueError, "`engine`"),
        ({"key": "k"}, TypeError, "`key` must be WatermarkKey, got str"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.rand(4, 1, 6, 5),
            torch.zeros(4),
            r"`images` must be floating point of shape \(n, 1, 6, 6\).*got torch.float32 of shape",
        ),
        (torch.rand(4, 6, 6), torch.zeros(4), "`images` must be floating point"),
        (torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.zeros(4), "got torch.uint8"),
        (
            torch.rand(4, *SHAPE),
            torch.zeros(3),
            r"`labels` must have shape \(4,\), one class index per "
            r"image, got \(3,\)",
        ),
        (torch.rand(4, *SHAPE), torch.zeros(4, 3), r"`labels` must have shape \(4,\).*got \(4, 3\)"),
    ],
)
def test_bad_batches_are_refused_before_they_are_kept(images, labels, message):
    watermarker = make()
    with pytest.raises(ValueError, match=message):
        watermarker.observe(images, labels, step=0)
    assert watermarker.buffer.images is None


# --- the mean over ranks (two real processes: tests/unit/metrics/test_two_ranks.py)


def test_global_mean_of_one_rank_needs_no_communication():
    total = torch.tensor([2.0, 4.0], requires_grad=True)
    assert global_mean(total, torch.tensor(4), world_size=1).tolist() == [0.5, 1.0]
    assert global_mean(total, torch.tensor(0), world_size=1).tolist() == [2.0, 4.0]


@pytest.mark.parametrize(("own", "other"), [(3.0, 1.0), (0.0, 4.0), (4.0, 0.0), (0.0, 0.0)])
def test_global_mean_of_two_ranks(monkeypatch, own, other):
    sums = torch.tensor([5.0, -3.0])

    def all_reduce(packed):
        assert not packed.requires_grad
        packed += torch.tensor([*sums.tolist(), other])

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    total = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = global_mean(total, torch.tensor(own), world_size=2)
    count = max(own + other, 1)
    torch.testing.assert_close(mean.detach(), (total.detach() + sums) / count)
    mean.sum().backward()
    torch.testing.assert_close(total.grad, torch.full((2,), 2 / count))


def test_the_smoothed_gradient_survives_an_overflowed_step():
    first = torch.ones(4)
    _, state = EmbeddingState().smoothing(first, 0.5)
    _, state = state.smoothing(torch.full((4,), torch.nan), 0.5)
    assert torch.equal(state.mean_gradient, first)
    assert torch.equal(state.smoothing(3 * first, 0.5)[0], 2 * first)


def test_steps_that_start_over_are_another_training():
    watermarker, model = fed(), network()
    embed(watermarker, model, 100)
    watermarker.observe(*batch(), step=0)
    assert due(watermarker, [0]) == [0]
    embed(watermarker, model, 0)
    assert due(watermarker, range(1, 6)) == [4, 5]


def test_batches_of_another_shape_are_refused():
    watermarker = make(carrier_layer="0")
    watermarker.observe(torch.ones(4, 7, dtype=torch.long), torch.ones(4), step=0)
    with pytest.raises(
        ValueError,
        match=r"`images` must have one shape in all batches.* got \(9,\) after "
        r"\(7,\). Pad text",
    ):
        watermarker.observe(torch.ones(4, 9, dtype=torch.long), torch.ones(4), step=1)


def test_a_step_that_is_not_finite_adds_nothing_and_is_counted():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(36, 3)

        def forward(self, x):
            return self.linear(x.flatten(1)) + (self.linear(x.flatten(1)) * 0).abs().sqrt()

    watermarker, model = fed(), Root()
    loss = embed(watermarker, model)
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters())
    assert (watermarker.state.n_embedded, int(watermarker.state.n_non_finite)) == (1, 1)
    embed(watermarker, network(), 4)
    assert (watermarker.state.n_embedded, int(watermarker.state.n_non_finite)) == (2, 1)
    watermarker.roll_back()
    assert (watermarker.state.n_embedded, int(watermarker.state.n_non_finite)) == (1, 1)
    embed(watermarker, Root(), 8)
    watermarker.roll_back()
    assert (watermarker.state.n_embedded, int(watermarker.state.n_non_finite)) == (1, 1)


@pytest.mark.parametrize(
    ("low", "high", "warned"), [(-2.0, 2.0, False), (-2.0, 4.0, True), (-4.0, 2.0, True), (0.0, 255.0, True)]
)
def test_images_that_are_no_raw_pixels_by_the_key_are_warned_of(low, high, warned, recwarn):
    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1, input_mean=0.5, input_std=0.25)
    model = network()
    make(key).prepare(model, model, batch()[0] * (high - low) + low)
    assert bool([w for w in recwarn if "the first batch's raw pixels range from" in str(w.message)]) == warned


@pytest.mark.parametrize(
    ("momentum", "training", "warned"),
    [(0.1, True, False), (0.01, True, True), (None, True, True), (0.01, False, False)],
)
def test_statistics_that_follow_the_weights_late_are_warned_of(momentum, training, warned, recwarn):
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=momentum), network()).train()
    model[0].train(training)  # a frozen backbone's statistics do not follow at all
    make(WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1)).prepare(model, model, batch()[0])
    assert [
        str(w.message).split("(")[1][:3] for w in recwarn if "lag behind the weights" in str(w.message)
    ] == ["'0'"] * warned
