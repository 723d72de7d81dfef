import torch

from gradsigns_lightning.attacks import LabelNoise
from gradsigns_lightning.attacks.base import AttackData
from gradsigns_lightning.benchmark import Judge, KeyReader, attacked
from gradsigns_lightning.benchmark.cells import digest
from gradsigns_lightning.core.key import WatermarkKey


def test_an_attack_that_is_watched_is_the_same_attack(owner, unmarked):
    data = owner().data
    key = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0, secret=bytes(32))
    judge = Judge(KeyReader(key, data.raw_images("test", 0)), data.test_dataloader())
    thief, attack = AttackData.of(data, owner().recipe), LabelNoise(epochs=3)
    before = torch.get_rng_state()
    watched, record = attacked(unmarked, attack, thief, judge)
    assert torch.equal(before, torch.get_rng_state())
    assert len(record.curve) == 3
    alone = attack(unmarked, thief).state_dict()
    assert all(torch.equal(alone[name], value) for name, value in watched.state_dict().items())


def test_other_images_are_another_cell_and_shipped_ones_are_the_same_anywhere():
    def named(target, root):
        module = {"_target_": f"gradsigns_lightning.data.{target}", "root": root}
        return digest({"data": {"module": module}}, ("data",))

    assert named("FashionMNIST", "/a") == named("FashionMNIST", "/b")
    assert named("ImageFolder", "/a") != named("ImageFolder", "/b")
