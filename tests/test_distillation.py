"""DistillationLoss: the values of its distances, which forwards count, and models that carry its hook."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.jobs.any_job import PER_TENSOR, AnyJob
from torch import nn

import amct_ext
from amct_ext.errors import InvalidDataError, StaleStateError


def networks(outputs=5):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight.mul_(1.5)
    return student, teacher, torch.randn(16, 4)


def test_kl_is_the_divergence_of_the_softened_classes():
    student, teacher, x = networks()
    distil = amct_ext.DistillationLoss(student, teacher, temperature=2.0)
    out = student(x)
    log_p, log_q = F.log_softmax(out / 2, 1), F.log_softmax(teacher(x) / 2, 1)
    expected = 4 * (log_q.exp() * (log_q - log_p)).sum(1).mean()
    torch.testing.assert_close(distil(), expected)


def test_classes_lie_along_axis_1_unless_told_and_three_axes_must_be_told():
    torch.manual_seed(0)
    for net, shape, axis in ((nn.Conv2d(3, 4, 1), (2, 3, 5, 5), 1), (nn.Linear(3, 4), (2, 5, 3), 2)):
        other, x = copy.deepcopy(net), torch.randn(shape)
        with torch.no_grad():
            other.weight.mul_(2)
        if axis == 2:
            net(x)
            unsaid = amct_ext.DistillationLoss(net, other)
            net(x)
            with pytest.raises(InvalidDataError, match="say by dim"):
                unsaid()
        distil = amct_ext.DistillationLoss(net, other, dim=None if axis == 1 else axis)
        log_p, log_q = (m(x).log_softmax(axis) for m in (net, other))
        torch.testing.assert_close(distil(), (log_q.exp() * (log_q - log_p)).sum(axis).mean())


def test_bce_mse_and_a_callable():
    student, teacher, x = networks(1)
    y, target = student(x), teacher(x).detach()
    for distance, expected in (
        ("bce", F.binary_cross_entropy_with_logits(y, target.sigmoid())),
        ("mse", (y - target).square().mean() / target.var(correction=0)),
        (F.l1_loss, (y - target).abs().mean()),
    ):
        distil = amct_ext.DistillationLoss(student, teacher, distance=distance)
        student(x)
        torch.testing.assert_close(distil(), expected)
        distil.close()


def test_weight_divides_between_task_and_teacher():
    student, teacher, x = networks()
    distil = amct_ext.DistillationLoss(student, teacher, weight=0.25)
    student(x)
    alone = distil()
    task = student(x).square().mean()
    torch.testing.assert_close(distil(task), 0.75 * task + 0.25 * alone)


def test_gradients_reach_the_student_alone():
    student, teacher, x = networks()
    distil = amct_ext.DistillationLoss(student, teacher.train())
    student(x)
    distil().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert not distil.state_dict() and not list(distil.parameters())


def test_only_training_forwards_count_and_each_once():
    student, teacher, x = networks()
    distil = amct_ext.DistillationLoss(student, teacher)
    student.eval()(x)
    with torch.no_grad():
        student.train()(x)
    with pytest.raises(StaleStateError, match="no training forward"):
        distil()
    student(x)
    student(x + 1)
    distil()
    with pytest.raises(StaleStateError, match="no training forward"):
        distil()


def test_logits_of_containers_count():
    class Wrapped(nn.Module):
        def __init__(self, net, kind):
            super().__init__()
            self.net, self.kind = net, kind

        def forward(self, x, extra=0.0):
            y = self.net(x) + extra
            return {"loss": y.sum(), "logits": y, "hidden": y * 3} if self.kind == "dict" else (y, [y.sum(), y.long()])

    for kind in ("dict", "tuple"):
        student, teacher, x = networks()
        both = Wrapped(student, kind), Wrapped(teacher, kind)
        distil = amct_ext.DistillationLoss(*both)
        both[0](x, extra=1.0)
        found = distil()
        distil = amct_ext.DistillationLoss(student, teacher)
        student(x)
        torch.testing.assert_close(found, distil())


def test_errors_say_what_does_not_fit():
    student, teacher, x = networks()
    with pytest.raises(ValueError, match="another module"):
        amct_ext.DistillationLoss(student, student)
    with pytest.raises(ValueError, match="between 0 and 1"):
        amct_ext.DistillationLoss(student, teacher, weight=2)
    with pytest.raises(ValueError, match="temperature"):
        amct_ext.DistillationLoss(student, teacher, temperature=0)
    with pytest.raises(ValueError, match="distance"):
        amct_ext.DistillationLoss(student, teacher, distance="cosine")
    with pytest.raises(TypeError, match="teacher"):
        amct_ext.DistillationLoss(student, lambda x: x)
    distil = amct_ext.DistillationLoss(student, nn.Linear(4, 3))
    student(x)
    with pytest.raises(InvalidDataError, match=r"\(16, 5\)\] and \[\(16, 3\)"):
        distil()
    single, same, x = networks(1)
    distil = amct_ext.DistillationLoss(single, same)
    single(x)
    with pytest.raises(InvalidDataError, match="'bce'"):
        distil()


def test_copies_pickles_and_a_compressed_job(tmp_path):
    student, teacher, x = networks()
    model = AnyJob(tmp_path, PER_TENSOR).create(student.eval(), x)
    distil = amct_ext.DistillationLoss(model, teacher)
    optimizer = torch.optim.Adam(model[0].parameters(), 0.01)
    first = None
    for _ in range(30):
        model.train()(x)
        loss = distil()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()(x + 5)
        assert distil._last_forward.last[0][0] is x
        assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))
    distil.close()
    model(x)
    with pytest.raises(StaleStateError):
        distil()
