"mixup: equations, both callbacks against them, what must not happen, bad input, exact resume, fastai's own loaders."
import random, signal
from functools import partial

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import load_learner
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat,
                           LabelSmoothingCrossEntropyFlat)
from fastai.metrics import accuracy
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from ssl_notes.core import Checkpoint, EMATeacher
from ssl_notes.mixup import PaperMixUp, interpolate, mixup_loss, soft_cross_entropy

from helpers import (DIGITS, Every, Items, die, differences, digits_dls, in_child, learner, linux, loader, own_dls,
                     quiet_fit, seeded, weights)

both = pytest.mark.parametrize('make', [partial(MixUp, 1.), partial(PaperMixUp, 1.)], ids=['fastai', 'paper'])
sizes = st.tuples(st.integers(1, 7), st.integers(2, 6), st.integers(0, 10**6))
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def case(b, c, seed):
    g = seeded(seed)
    y_a, y_b = (torch.randint(c, (b,), generator=g) for _ in range(2))
    return 5*torch.randn(b, c, generator=g), y_a, y_b, torch.rand(b, generator=g)


# -- equations ------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(sizes, st.booleans())
def test_two_ways_to_one_loss(size, one):
    z, y_a, y_b, lam = case(*size)
    if one: lam = lam[0]
    a, b = (F.one_hot(y, size[1]).float() for y in (y_a, y_b))
    t = interpolate(a, b, lam)
    loss = mixup_loss(z, y_a, y_b, lam)
    torch.testing.assert_close(loss, soft_cross_entropy(z, t))
    torch.testing.assert_close(loss, F.cross_entropy(z, t))
    torch.testing.assert_close(t.sum(1), torch.ones(len(z)))
    # never below the entropy of the labels, which the right answer reaches
    h = torch.special.entr(t).sum(1).mean()
    assert loss >= h - 1e-5
    torch.testing.assert_close(soft_cross_entropy((t + 1e-30).log(), t), h)
    # the other order at the other share is the same
    torch.testing.assert_close(loss, mixup_loss(z, y_b, y_a, 1 - lam))

@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(0, 1))
def test_interpolation(size, lam):
    g = seeded(size[2])
    a, b = (torch.rand(size[0], 3, size[1], generator=g) for _ in range(2))
    mixed = interpolate(a, b, lam)
    torch.testing.assert_close(mixed, interpolate(b, a, 1 - lam))
    assert (mixed >= torch.minimum(a, b) - 1e-6).all() and (mixed <= torch.maximum(a, b) + 1e-6).all()
    rows = torch.full((len(a),), lam)
    assert torch.equal(mixed, interpolate(a, b, rows))
    assert torch.equal(interpolate(a, b, 1.), a) and torch.equal(interpolate(a, b, 0.), b)
    assert torch.equal(interpolate(a, a, lam), a)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    a, b = torch.rand(3, 4).to(dtype), torch.rand(3, 4).to(dtype)
    for lam in (.3, np.float32(.3), torch.tensor(.3), torch.tensor([.1, .2, .3], dtype=torch.float64)):
        assert interpolate(a, b, lam).dtype == dtype

def test_gradients_reach_images_and_nothing_else_changes():
    a, b = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    interpolate(a, b, .25).sum().backward()
    assert (a.grad == .25).all() and (b.grad == .75).all()
    z, y_a, y_b, lam = case(4, 3, 0)
    z.requires_grad_()
    mixup_loss(z, y_a, y_b, lam).backward()
    t = interpolate(F.one_hot(y_a, 3).float(), F.one_hot(y_b, 3).float(), lam)
    torch.testing.assert_close(z.grad, (z.detach().softmax(1) - t)/4)

def test_bad_arguments():
    f, i = torch.rand(4, 2), torch.arange(4)
    for a, b in ((i, i), (f, i), (f.byte(), f)):
        with pytest.raises(TypeError, match='CrossEntropyLossFlat'): interpolate(a, b, .5)
    for bad in (torch.rand(3), torch.rand(4, 1), torch.rand(4, 2), torch.rand(1)):
        with pytest.raises(ValueError, match='lam'): interpolate(f, f, bad)
        with pytest.raises(ValueError, match='lam'): mixup_loss(f, i % 2, i % 2, bad)
    with pytest.raises(ValueError, match='x1, x2'): interpolate(f, f[:1], .5)
    with pytest.raises(ValueError, match='y_a, y_b'): mixup_loss(f, i % 2, i[:1] % 2, .5)
    with pytest.raises(ValueError, match='one_hot'): soft_cross_entropy(f, i)
    for bad in (0, 0., -1, float('nan'), float('inf'), None, 'a', [1.]):
        with pytest.raises(ValueError, match='alpha'): PaperMixUp(bad)
    assert PaperMixUp(np.float32(2)).distrib.concentration1 == 2


# -- the callbacks --------------------------------------------------------------------------------
class Record(Callback):
    "What went in and came out of every training step."
    order = 99
    def __init__(self, mix): self.mix, self.steps = mix, []
    def after_loss(self):
        if not self.training: return
        self.steps.append((self.xb[0].clone(), self.y.clone(), self.mix.yb1[0].clone(), self.mix.lam.clone(),
                           self.pred.detach().clone(), self.learn.loss_grad.detach().clone()))

@both
def test_each_step_is_the_equation(make):
    mix = make()
    rec = Record(mix)
    quiet_fit(learner([mix, rec]), 2, 1e-2)
    assert len(rec.steps) == 8
    for x, y, y_b, lam, z, loss in rec.steps:
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), mixup_loss(z, y, y_b, lam), rtol=1e-5, atol=1e-6)
        assert lam.shape == (() if isinstance(mix, PaperMixUp) else y.shape)
    lams = torch.stack([s[3].mean() for s in rec.steps])
    assert len(lams.unique()) == 8
    if not isinstance(mix, PaperMixUp): assert all((s[3] >= .5).all() for s in rec.steps)

@pytest.mark.parametrize('alpha', [.4, 1., 4.])
def test_no_maximum_and_the_distribution(alpha):
    "The shares of many batches have the variance of the Beta distribution, on both sides of a half"
    mix = PaperMixUp(alpha)
    learn = learner(mix)
    mix.stack_y, lam = True, []
    for _ in range(2000):
        learn.xb, learn.yb = (torch.rand(2, 1),), (torch.arange(2),)
        mix.before_batch()
        lam.append(mix.lam)
    lam, var = torch.stack(lam), 1/(4*(2*alpha + 1))
    assert abs(lam.mean() - .5) < 5*(var/2000)**.5 and abs(lam.var()/var - 1) < .15
    torch.testing.assert_close((lam > .5).float().mean(), torch.tensor(.5), atol=.06, rtol=0)

@both
def test_labels_are_mixed_if_the_loss_takes_soft_ones(make):
    "One-hot floats and a loss without `y_int`: the labels themselves are mixed; the same loss"
    class OneHot(Callback):
        order = -1
        def before_batch(self): self.learn.yb = (F.one_hot(self.y, 10).float().as_subclass(torch.Tensor),)
    def losses(cbs, **kw):
        mix = make()
        rec = Record(mix)
        quiet_fit(learner([*cbs, mix, rec], model=linear, metrics=[], **kw), 1, 1e-2)
        return torch.stack([s[-1].as_subclass(torch.Tensor) for s in rec.steps])
    torch.testing.assert_close(losses([OneHot()], loss_func=soft_cross_entropy), losses([]))

@both
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, FocalLossFlat,
                                  partial(CrossEntropyLossFlat, reduction='sum')])
def test_losses_of_fastai(make, loss):
    mix, f = make(), loss()
    rec = Record(mix)
    quiet_fit(learner([mix, rec], loss_func=f, model=linear), 1, 1e-4)
    x, y, y_b, lam, z, got = rec.steps[0]
    each = loss(reduction='none')
    want = lam*each(z, y) + (1-lam)*each(z, y_b)
    want = want.sum() if f.reduction == 'sum' else want.mean()
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))

@both
def test_validation_is_untouched(make):
    "Seen by the model in validation: the validation images, and nothing is drawn"
    seen = []
    mix = make()
    look = Every('after_pred', lambda cb: None if cb.training else seen.append((cb.xb[0].clone(), torch.get_rng_state())), valid=True)
    learn = quiet_fit(learner([mix, look]), 1)
    assert torch.equal(seen[0][0].as_subclass(torch.Tensor), DIGITS_VALID(learn))
    state = torch.get_rng_state()
    with learn.no_bar(): a, b = learn.validate(), learn.get_preds()
    assert torch.equal(state, torch.get_rng_state())
    assert abs((b[0].argmax(1) == b[1]).float().mean() - a[1]) < 1e-6

def DIGITS_VALID(learn): return next(iter(learn.dls.valid))[0].as_subclass(torch.Tensor)

@both
@pytest.mark.parametrize('error', [None, CancelBatchException, CancelTrainException, CancelFitException])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_step', 'after_train'])
def test_no_trace(make, error, event):
    learn = learner()
    f, names = learn.loss_func, sorted(cb.name for cb in learn.cbs)
    def stop(cb):
        if error and (cb.training or event == 'after_train'): raise error('stop')
    if not (event == 'after_train' and error in (CancelBatchException, CancelTrainException)):
        quiet_fit(learn, 1, cbs=[make(), Every(event, stop)])
    assert learn.loss_func is f and sorted(cb.name for cb in learn.cbs) == names

def test_lr_find():
    learn = learner(PaperMixUp())
    f = learn.loss_func
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=4)
    assert learn.loss_func is f

@pytest.mark.parametrize('where', ['before_batch', 'after_loss', 'after_step'])
@pytest.mark.parametrize('same', [True, False])
def test_mends_what_an_interrupt_left(where, same):
    "Whether fastai's or its own, whether the callback stays or a new one comes"
    class Stop(Exception): pass
    def stop(cb): raise Stop('stop')
    for make in (PaperMixUp, partial(MixUp, 1.)):
        learn = learner()
        f, mix = learn.loss_func, make()
        with pytest.raises(Stop): quiet_fit(learn, 1, cbs=[mix, Every(where, stop)])
        assert learn.loss_func is not f
        quiet_fit(learn, 1, cbs=mix if same and make is PaperMixUp else PaperMixUp())
        assert learn.loss_func is f

def test_two_of_them_are_refused():
    for cbs in ([PaperMixUp(), MixUp(1.)], [MixUp(1.), PaperMixUp()], [CutMix(), PaperMixUp()], [PaperMixUp(), PaperMixUp(.4)]):
        learn = learner(cbs)
        w = weights(learn)
        with pytest.raises(ValueError, match='keep one'): quiet_fit(learn, 1)
        assert differences(w, weights(learn)) == []

def test_integer_labels_without_y_int():
    learn = learner(PaperMixUp(), loss_func=nn.CrossEntropyLoss())
    w = weights(learn)
    with pytest.raises(TypeError, match='CrossEntropyLossFlat'): quiet_fit(learn, 1)
    assert differences(w, weights(learn)) == [] and isinstance(learn.loss_func, nn.CrossEntropyLoss)

def test_batch_of_one():
    "Is trained on as it is: mixed with itself"
    mix = PaperMixUp()
    rec, seen = Record(mix), []
    first = Every('before_batch', lambda cb: None)
    first.order, first.before_batch = -5, lambda: seen.append(first.xb[0].clone())
    quiet_fit(learner([first, mix, rec], digits_dls(bs=1), linear), 1)
    for a, s in zip(seen, rec.steps): assert torch.equal(a.as_subclass(torch.Tensor), s[0].as_subclass(torch.Tensor))

def test_several_inputs_share_their_partner():
    class Two:
        n_inp = 2
        def __len__(self): return 32
        def __getitem__(self, i): return torch.full((3,), float(i)), torch.full((2, 2), float(i)), i % 4
    dls = DataLoaders(loader(Two(), 8), loader(Two(), 8, False))
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l, self.seen = nn.Linear(3, 4), []
        def forward(self, a, b):
            if self.training: self.seen.append((a, b))
            return self.l(a)
    learn = learner(PaperMixUp(), dls, Net, metrics=[])
    quiet_fit(learn, 1)
    for a, b in learn.model.seen: assert torch.equal(a[:, 0], b[:, 0, 0])

def test_with_others():
    "Accumulated gradients and an averaged teacher"
    learn = learner([PaperMixUp(), GradientAccumulation(16), EMATeacher(.5)])
    quiet_fit(learn, 2, 1e-2)
    assert learn.ema_teacher.n_updates == 4 and np.isfinite(learn.recorder.values[-1][0])


# -- who is mixed with whom -----------------------------------------------------------------------
def test_share_of_rows_with_a_partner_of_their_own_class():
    "On average 1/B + (1 - 1/B) sum p_k^2 for independent rows"
    dls = own_dls(Items(2000), bs=20)
    mix = PaperMixUp()
    rec = Record(mix)
    quiet_fit(learner([mix, rec], dls, linear), 2)
    same = torch.cat([(s[1] == s[2]).float() for s in rec.steps])
    assert abs(same.mean() - (1/20 + 19/20/10)) < .025

@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_swapping_a_pair(n, seed):
    "One share for all: (lam, perm) and (1-lam, inverse) make the same rows in another order"
    g = seeded(seed)
    x, perm, lam = torch.rand(n, 4, generator=g), torch.randperm(n, generator=g), torch.rand((), generator=g)
    inverse = perm.argsort()
    a, b = interpolate(x, x[perm], lam), interpolate(x, x[inverse], 1 - lam)
    torch.testing.assert_close(a, b[perm])


# -- resume ---------------------------------------------------------------------------------------
def trained(make, folder, cbs=()):
    return learner([make(), EMATeacher(.9), Checkpoint(folder, every=3), *cbs], digits_dls(steps=5))

@both
def test_resume_is_exact(make, tmp_path):
    def stop(cb):
        if cb.training and cb.train_iter == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(trained(make, tmp_path/'cut', [Every('after_batch', stop)]), 2, 1e-2)
    cut = quiet_fit(trained(make, tmp_path/'cut'), 2, 1e-2)
    whole = quiet_fit(trained(make, tmp_path/'whole'), 2, 1e-2)
    assert differences(weights(cut), weights(whole)) == []
    assert differences(weights(cut.ema_teacher.teacher), weights(whole.ema_teacher.teacher)) == []

@linux
def test_killed_and_resumed(tmp_path):
    def stop(cb):
        if cb.training and cb.train_iter == 8: die()
    assert in_child(lambda: quiet_fit(trained(PaperMixUp, tmp_path/'cut', [Every('after_batch', stop)]), 2, 1e-2)) == signal.SIGKILL
    cut = quiet_fit(trained(PaperMixUp, tmp_path/'cut'), 2, 1e-2)
    assert differences(weights(cut), weights(quiet_fit(trained(PaperMixUp, tmp_path/'whole'), 2, 1e-2))) == []

@both
def test_seed(make):
    def end(seed): return weights(quiet_fit(learner(make(), seed=seed, dls=digits_dls()), 1, 1e-2))
    assert differences(end(1), end(1)) == [] and differences(end(1), end(2))

def test_only_torch_is_drawn_from():
    random.seed(0); np.random.seed(0)
    a = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    learn = learner(PaperMixUp())
    random.seed(0); np.random.seed(0)
    quiet_fit(learn, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == a


# -- fastai's own loaders -------------------------------------------------------------------------
def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def own(y=CategoryBlock, get_y=lambda i: int(DIGITS.train.y[i])):
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, y), get_x=picture, get_y=get_y, splitter=IndexSplitter(range(24, 36)),
                      item_tfms=Resize(32), batch_tfms=aug_transforms(size=32, do_flip=False))
    return block.dataloaders(list(range(36)), bs=8, num_workers=0, device='cpu')

def test_vision_learner(tmp_path):
    "Train with a DataBlock, export, load, predict"
    learn = vision_learner(own(), resnet18, pretrained=False, metrics=accuracy, cbs=PaperMixUp())
    quiet_fit(learn, 1, 1e-3)
    with learn.no_bar(): here = learn.predict(picture(3))
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    with loaded.no_bar(): there = loaded.predict(picture(3))
    assert here[0] == there[0] and torch.allclose(here[2], there[2], atol=1e-5)

def test_many_labels_at_once():
    "Multi-label: float targets, which are mixed themselves"
    mix = PaperMixUp()
    dls = own(MultiCategoryBlock, lambda i: [str(int(DIGITS.train.y[i])), 'odd' if DIGITS.train.y[i] % 2 else 'even'])
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=mix, loss_func=BCEWithLogitsLossFlat())
    seen = []
    learn.add_cb(Every('after_pred', lambda cb: seen.append(cb.y.clone())))
    quiet_fit(learn, 1, 1e-3)
    y = torch.cat([s.as_subclass(torch.Tensor) for s in seen])
    torch.testing.assert_close(y.sum(1), torch.full((len(y),), 2.))
    assert ((y > 0) & (y < 1)).any()
