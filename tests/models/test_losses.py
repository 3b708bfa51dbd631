import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cpm_rcnn.models.losses import LossTerm, reduce_losses


def test_mean_is_total_divided_by_an_int_or_tensor_count():
    means = reduce_losses(
        {
            "a": LossTerm(torch.tensor(6.0), 4),
            "b": LossTerm(torch.tensor(6.0), torch.tensor(3)),
            "c": LossTerm(torch.tensor(1.0), torch.tensor(1.0)),
        }
    )
    assert {name: mean.item() for name, mean in means.items()} == {"a": 1.5, "b": 2.0, "c": 1.0}
    assert all(mean.shape == () for mean in means.values())


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_count_of_zero_gives_a_zero_loss_that_has_a_gradient(count):
    values = torch.zeros(0, requires_grad=True)
    mean = reduce_losses({"loss": LossTerm(values.sum(), count)})["loss"]
    assert mean.item() == 0
    mean.backward()
    assert values.grad is not None


def test_gradient_is_the_gradient_of_the_mean():
    values = torch.arange(4.0, requires_grad=True)
    reduce_losses({"loss": LossTerm(values.square().sum(), 4)})["loss"].backward()
    torch.testing.assert_close(values.grad, 2 * torch.arange(4.0) / 4)


def test_weight_multiplies_the_total_but_not_the_count():
    assert LossTerm(torch.tensor(3.0), 7).weighted(0.5) == LossTerm(torch.tensor(1.5), 7)


# Rows that each of two images contributes to a loss: "grid" has none in image 1, "rare" less than one per image.
ROWS = {"cls": (3, 5), "grid": (4, 0), "rare": (0, 1), "none": (0, 0)}


class Toy(nn.Module):
    """A linear layer whose losses are the mean squared outputs for the rows of some images."""

    def __init__(self, mean_over="run"):
        super().__init__()
        self.mean_over = mean_over
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(6, 2, bias=False)
        self.linear.weight.data = torch.randn(2, 6, generator=generator)
        self.rows = {name: [torch.randn(n, 6, generator=generator) for n in counts] for name, counts in ROWS.items()}

    def forward(self, images):
        terms = {}
        for i, (name, per_image) in enumerate(self.rows.items()):
            rows = torch.cat([per_image[image] for image in images])
            count = torch.tensor(len(rows)) if i % 2 else len(rows)
            terms[name] = LossTerm(self.linear(rows).square().sum(), count)
        return reduce_losses(terms, self.mean_over)


def train_one_image(rank, file, folder, mean_over):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Toy(mean_over))
    losses = model([rank])
    sum(losses.values()).backward()
    result = {name: loss.item() for name, loss in losses.items()}, model.module.linear.weight.grad
    torch.save(result, f"{folder}/{rank}.pt")
    # If one process ends while the other is still connected to it, the other can be aborted.
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_one_image_each_get_the_gradient_of_one_process_with_both(tmp_path):
    whole = Toy()
    losses = whole([0, 1])
    sum(losses.values()).backward()
    mp.spawn(train_one_image, (tmp_path / "rendezvous", tmp_path, "run"), nprocs=2)
    (first, gradient), (second, same_gradient) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(gradient, same_gradient)
    torch.testing.assert_close(gradient, whole.linear.weight.grad)
    assert {name: (first[name] + second[name]) / 2 for name in ROWS} == pytest.approx(
        {name: loss.item() for name, loss in losses.items()}, rel=1e-5
    )
    assert first["none"] == second["none"] == second["grid"] == first["rare"] == 0


def test_with_a_mean_per_process_two_processes_get_the_mean_gradient_of_one_process_for_each_image(tmp_path):
    alone = [Toy("process") for _ in range(2)]
    losses = [toy([image]) for image, toy in enumerate(alone)]
    for each in losses:
        sum(each.values()).backward()
    mp.spawn(train_one_image, (tmp_path / "rendezvous", tmp_path, "process"), nprocs=2)
    for rank in range(2):
        found, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx({name: loss.item() for name, loss in losses[rank].items()})
        torch.testing.assert_close(gradient, sum(toy.linear.weight.grad for toy in alone) / 2)
    whole = Toy()
    sum(whole([0, 1]).values()).backward()
    assert not torch.allclose(gradient, whole.linear.weight.grad)
