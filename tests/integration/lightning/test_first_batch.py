"""What the first batch shows.

Each error names the override that helps, and a step that normalizes is warned of.
"""

import warnings

import pytest
import torch
from signed_digits import (
    MEAN,
    STD,
    TARGET,
    Net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    mlp,
    train_loader,
    val_loader,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gradsigns_lightning import GradSigns, WatermarkKey, verify
from gradsigns_lightning.integration.hooks import Hooks
from gradsigns_lightning.integration.input_watch import InputWatch

pytestmark = pytest.mark.usefixtures("seeded")


def taken(images, labels, input_shape):
    """Let the callback extract the inputs and classes of a batch."""
    return extracted(
        GradSigns(WatermarkKey.generate("A", 16, input_shape=input_shape, target_class=0)), (images, labels)
    )


def extracted(mark, batch):
    return Hooks(Net(), mark.images_and_labels, None, mark.watermarker).extract(batch)


def named(items):
    return {"image": torch.stack([x for x, _ in items]), "label": torch.tensor([int(y) for _, y in items])}


class OfBatch(Net):
    def forward(self, batch):
        x, _ = batch
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch[1])


class OfMapping(Net):
    def forward(self, batch):
        return self.net(batch["image"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["label"])


class OfKeywords(OfMapping):
    def forward(self, **batch):
        return self.net(batch["image"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(**batch), batch["label"])


class WithoutForward(Net):
    forward = nn.Module.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class TwoParts(WithoutForward):
    def __init__(self):
        super().__init__()
        self.body, self.top = self.net[:-1], self.net[-1]
        del self.net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.top(self.body(batch[0])), batch[1])


class Tuple(Net):
    def forward(self, x):
        return None, self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[1], batch[1])


class Dictionary(Net):
    def forward(self, x):
        return {"features": x, "scores": self.net(x)}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])["scores"], batch[1])


FORMS = [
    (OfBatch, "pl_module((images, None))"),
    (OfMapping, "pl_module({'image': images})"),
    (OfKeywords, "pl_module(image=images)"),
    (WithoutForward, "pl_module.net(images)"),
    (TwoParts, "pl_module.top(pl_module.body(images))"),
    (Tuple, "pl_module(images)[1]"),
    (Dictionary, "pl_module(images)['scores']"),
]


def data_for(form):
    loader = train_loader(400)
    return DataLoader(loader.dataset, 40, collate_fn=named) if issubclass(form, OfMapping) else loader


@pytest.mark.parametrize(("form", "code"), FORMS)
def test_an_error_in_the_logits_hook_ends_with_the_override_that_works(form, code):
    with pytest.raises(ValueError, match=r"Override `GradSigns.logits` in a subclass") as caught:
        make_trainer(make_mark(), max_epochs=1).fit(form(), data_for(form))
    assert str(caught.value).endswith(
        f"this works here:\n    def logits(self, pl_module, images): return {code}"
    )

    class Mine(GradSigns):
        def logits(self, pl_module, images):
            return eval(code)

    make_trainer(Mine(make_key(), cadence=2), max_epochs=1).fit(form(), data_for(form))  # and it does


class Predicts(Net):
    @torch.no_grad()
    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Detaches(Predicts):
    def forward(self, x):
        return self.net(x.detach())


class ThroughNumpy(Predicts):
    def forward(self, x):
        return self.net(torch.tensor(x.detach().numpy()))


@pytest.mark.parametrize("model", [Predicts, Detaches, ThroughNumpy])
@pytest.mark.parametrize("validation", [True, False])
def test_logits_without_a_gradient_come_with_the_override_that_has_one(model, validation):
    with pytest.raises(
        ValueError,
        match=r"must depend on the images .*(?s:.*)this works here(?s:.*)return "
        r"pl_module.net\(images\)$",
    ):
        make_trainer(make_mark(), max_epochs=1).fit(
            model(), train_loader(80), val_loader() if validation else None
        )


def test_where_nothing_works_an_example_is_given():
    class Odd(WithoutForward):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"only": self.net})

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net["only"](batch[0]), batch[1])

    with pytest.raises(
        ValueError,
        match=r"(?s)Override `GradSigns.logits`.*for "
        r"example:\n.*pl_module.net\(images\)",
    ):
        make_trainer(make_mark()).fit(Odd(), train_loader())


@pytest.mark.parametrize(
    ("logit", "code"),
    [
        (lambda z: z, "torch.nn.functional.pad(pl_module(images), (1, 0))"),
        (lambda z: z[:, 0], "torch.nn.functional.pad(pl_module(images)[:, None], (1, 0))"),
    ],
)
def test_a_single_logit_is_given_its_other_class(logit, code):
    class Single(Net):
        def forward(self, x):
            return logit(self.net(x))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.binary_cross_entropy_with_logits(self(x).flatten(), y.float())

    def model():
        return Single(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1)))

    key, loader = make_key(target_class=1), train_loader(400)
    data = DataLoader([(x, int(y == TARGET)) for x, y in loader.dataset], 40)
    with pytest.raises(ValueError, match=r"Override `GradSigns.logits`") as caught:
        make_trainer(make_mark(key)).fit(model(), data)
    assert str(caught.value).endswith(f"return {code}")


def test_too_few_classes_are_the_keys_business():
    with pytest.raises(
        ValueError, match="`target_class` must be below the number of classes 10, got 12"
    ) as caught:
        make_trainer(make_mark(make_key(target_class=12))).fit(Net(), train_loader())
    assert "Override" not in str(caught.value)


def test_the_first_call_outside_a_fit_is_explained_too():
    class Validates(OfBatch):
        def validation_step(self, batch, batch_idx):
            self(batch)

    with pytest.raises(ValueError, match=r"pl_module\(\(images, None\)\)$"):
        make_trainer(make_mark()).validate(Validates(), val_loader(), verbose=False)


X = torch.rand(6, 1, 8, 8)
Y = torch.arange(6)


@pytest.mark.parametrize(
    ("images", "labels", "cure"),
    [
        (X, F.one_hot(Y, 10), "return x, y.argmax(1)"),
        (X, Y[:, None], "return x, y.flatten()"),
        ((X * 255).to(torch.uint8), Y, "return (x.float() / 255), y"),
        (X.long(), Y, "return x.float(), y"),
        (X.flatten(1), Y, "return x.reshape(-1, 1, 8, 8), y"),
        (X.flatten(1)[:, None], Y, "return x.reshape(-1, 1, 8, 8), y"),
        (X[:, 0], Y, "return x.reshape(-1, 1, 8, 8), y"),
        (X.view(6, 1, 2, 4, 8), Y, "return x.reshape(-1, 1, 8, 8), y"),
    ],
)
def test_a_shape_that_is_not_the_keys_comes_with_the_line_that_helps(images, labels, cure):
    with pytest.raises(
        ValueError,
        match=r"(?s)`(images|labels)` must .*Override "
        r"`GradSigns.images_and_labels`",
    ) as caught:
        taken(images, labels, (1, 8, 8))
    assert cure in str(caught.value)
    x, y = eval(cure.removeprefix("return "), {"x": images, "y": labels})
    taken(x, y, (1, 8, 8))


ZEROS = torch.zeros(6)


@pytest.mark.parametrize(
    ("batch", "code"),
    [
        ((X, Y, torch.arange(6)), "batch[0], batch[1]"),
        ((ZEROS, Y, X), "batch[2], batch[1]"),
        ({"img": X, "cls": Y, "weight": ZEROS}, "batch['img'], batch['cls']"),
        ({"image": X, "label": Y, "target": ZEROS}, "batch['image'], batch['label']"),
        ({"unlabelled": X + 1, "labelled": [X, Y]}, "batch['labelled'][0], batch['labelled'][1]"),
        (((X, ZEROS), {"label": Y}), "batch[0][0], batch[1]['label']"),
        ([[X, Y], 3], "batch[0][0], batch[0][1]"),
    ],
)
def test_a_batch_of_another_form_comes_with_the_line_that_takes_it_apart(batch, code):
    mark = GradSigns(WatermarkKey.generate("A", 16, input_shape=(1, 8, 8), target_class=0))
    with pytest.raises(
        TypeError, match=r"must be two tensors .*, for example:\n    def images_and_labels"
    ) as caught:
        extracted(mark, batch)
    assert str(caught.value).endswith(f"return {code}")
    x, y = eval(code, {"batch": batch})
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


@pytest.mark.parametrize("batch", [(X, ZEROS, ZEROS), X, 3, {"image": X, "label": "none"}, (X, Y[:3], "a")])
def test_a_batch_without_class_indices_comes_without_an_example(batch):
    with pytest.raises(TypeError, match=r"for batches of another form\.$"):
        extracted(GradSigns(WatermarkKey.generate("A", 16, input_shape=(1, 8, 8), target_class=0)), batch)


def test_labels_that_come_first_are_swapped():
    with pytest.raises(ValueError, match=r"Do labels come first\?(?s:.*)return y, x$"):
        taken(Y, X, (1, 8, 8))


def test_the_network_gets_flat_inputs_back():
    with pytest.raises(ValueError, match=r"return pl_module\(images.reshape\(-1, 64\)\)$"):
        taken(X.flatten(1), Y, (1, 8, 8))


def test_channels_last():
    images = torch.rand(6, 8, 8, 3)
    with pytest.raises(
        ValueError,
        match=r"return x.permute\(0, 3, 1, 2\), "
        r"y\n.*pl_module\(images.permute\(0, 2, 3, 1\)\)$",
    ):
        taken(images, Y, (3, 8, 8))


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 9, 9), "Make a key with `input_shape=(3, 9, 9)`"),
        ((50,), "`input_shape=(1, 1, 50)`"),
        ((9, 9), "`input_shape=(1, 9, 9)`"),
    ],
)
def test_images_of_another_size_need_another_key(shape, advice):
    with pytest.raises(ValueError, match=r"override `GradSigns.images_and_labels`") as caught:
        taken(torch.rand(6, *shape), Y, (1, 8, 8))
    assert advice in str(caught.value)


def raw_loader():
    x, y = train_loader(400).dataset.tensors
    return DataLoader(list(zip(x * STD + MEAN, y, strict=True)), 40)


class Normalizes(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step(((x - MEAN) / STD, y), batch_idx)


class Scales(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step(((x * 8) ** 2, y), batch_idx)


class Resizes(Net):
    def forward(self, x):
        return self.net(x.reshape(-1, 1, 8, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(
            self.net[1:](self.net[0](x[..., :8, :4].repeat(1, 1, 1, 2).reshape(-1, 64))), y
        )


def warned(model, loader, mark=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(mark or make_mark(), max_epochs=1).fit(model, loader)
    assert not any(m._forward_pre_hooks for m in model.modules())
    return [str(w.message) for w in caught if "The step gives the network other images" in str(w.message)]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Normalizes, f"they are (x - {MEAN}) / {STD}, where x are those of the batch"),
        (Scales, "they range from 0 to"),
        (Resizes, "they have shape (64,), not (1, 8, 8)"),
    ],
)
def test_a_step_that_gives_the_network_other_images_is_warned_of_once(model, words):
    (message,) = warned(model(), raw_loader())
    assert words in message
    assert "override `GradSigns.images_and_labels`" in message


def test_the_override_that_was_named_signs_what_the_network_gets():
    class Mine(GradSigns):
        def images_and_labels(self, batch):
            x, y = super().images_and_labels(batch)
            return (x - MEAN) / STD, y

    model, mark = Normalizes(), Mine(make_key(), cadence=2, momentum=0.0, strength=0.5)
    assert not warned(model, raw_loader(), mark)
    make_trainer(mark, max_epochs=10).fit(model, raw_loader())
    assert verify(model, mark.key, held_out_target_images()).bit_error_rate == 0


class Augments(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = 0.1 * torch.randn_like(x) + torch.rand(len(x), 1, 1, 1) * 0.1
        return super().training_step((x.roll(1, -1).flip(-1) * 0.9 + noise, y), batch_idx)


class Mixes(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((0.7 * x + 0.3 * x.flip(0), y), batch_idx)


class InsideForward(Net):
    def forward(self, x):
        return super().forward(2 * x - 1)


@pytest.mark.parametrize("model", [Net, Augments, Mixes, InsideForward])
def test_a_step_that_augments_is_accepted(model):
    assert not warned(model(), train_loader(400))


def test_a_normalization_by_channel_is_shown_as_code():
    layer = nn.Identity()
    module = nn.Sequential(layer)
    watch, x = InputWatch(module), torch.rand(8, 3, 4, 4)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(-1, 1, 1)
    with watch.recording():
        module(x)
    watch.watch_the_step()
    with pytest.warns(UserWarning, match="other images") as caught:
        module((x - mean) / std)
    code = str(caught[0].message).split("(batch); return ")[1].split(", y\n")[0]
    torch.testing.assert_close(eval(code, {"x": x}), (x - mean) / std, rtol=0, atol=0.02)


def test_compiled_networks_are_not_hooked():
    model = nn.Sequential(torch.compile(mlp(), backend="eager"))
    watch = InputWatch(model)
    with watch.recording():
        assert not any(m._forward_pre_hooks for m in model.modules())
