"Mean Teacher: the two recipes, who gets a gradient, bad input, exact resume, and fastai's own loaders."
import math, random, signal
from functools import partial

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch
from fastai.callback.core import CancelFitException, CancelStepException
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.augment import RandomCrop, Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from ssl_notes.augment import weak_augment
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unlabeled_dl
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.mean_teacher import (MeanTeacherCallback, consistency_cost, consistency_kl, consistency_mse,
                                    consistency_weight, cosine_rampdown, kl_scale, svhn_decay, warm_decay)

from helpers import (DIGITS, Every, die, differences, digits_dls, in_child, learner, linux, quiet_fit, tiny_net,
                     weights)

mean_teacher = partial(MeanTeacherCallback, rampup=3, ema=.9)
RECIPES = 'tensorflow', 'pytorch'
noisy = partial(tiny_net, dropout=.3)

def mixed(bs=16, steps=5, n=100, **kw):
    return mixed_dls(DIGITS, n, bs=bs, augment=weak_augment('digits'), steps=steps, valid=40, device='cpu', **kw)

def loaders(kind, steps=5): return digits_dls(steps=steps) if kind == 'streams' else mixed(steps=steps)
kinds = pytest.mark.parametrize('kind', ['streams', 'mixed'])

def teacher_of(learn): return learn.ema_teacher.teacher


# -- equations ------------------------------------------------------------------------------------
rows = st.integers(2, 12).flatmap(lambda c: st.lists(st.lists(st.floats(-30, 30), min_size=2*c, max_size=2*c), min_size=1, max_size=5))

@settings(max_examples=60, deadline=None)
@given(rows)
def test_bounds(rows):
    z, t = torch.tensor(rows).chunk(2, 1)
    t, c = t.softmax(1), z.shape[1]
    mse, kl = consistency_mse(z, t), consistency_kl(z, t)
    assert mse.shape == kl.shape == (len(z),)
    assert (mse >= 0).all() and (mse <= 2/c + 1e-5).all() and (kl >= -1e-4).all() and kl.isfinite().all()
    # Pinsker: a squared distance is never above twice the divergence
    assert (mse*c <= 2*kl + 1e-3).all()
    torch.testing.assert_close(consistency_cost(z, t), mse.mean())
    torch.testing.assert_close(consistency_cost(z, t, 'kl'), kl_scale(c)*kl.mean())

def test_order_of_rows_does_not_matter_but_which_are_kept_does():
    z, t = torch.randn(6, 4), torch.randn(6, 4).softmax(1)
    perm = torch.randperm(6)
    torch.testing.assert_close(consistency_cost(z, t), consistency_cost(z[perm], t[perm]))
    keep = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    torch.testing.assert_close(consistency_cost(z, t, keep=keep)*6, consistency_cost(z[keep], t[keep])*3)
    assert consistency_cost(z, t, keep=torch.zeros(6).bool()) == 0

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_warm_up_is_the_plain_mean(values):
    t = values[0]
    for s,v in enumerate(values[1:]):
        d = warm_decay(s)
        t = d*t + (1-d)*v
    assert math.isclose(t, np.mean(values), abs_tol=1e-9)

def test_decays_and_ramps():
    assert warm_decay(0) == .5 and warm_decay(10**9) == .999 and warm_decay(0, .3) == .3 and warm_decay(5, 0.) == 0
    assert svhn_decay(39_999) == .99 and svhn_decay(40_000) == .999
    assert [round(kl_scale(c), 9) for c in (2, 10)] == [.25, .018]
    w = [consistency_weight(s, 7., 100) for s in range(0, 201, 10)]
    assert w == sorted(w) and w[10] == w[-1] == 7. and math.isclose(w[0], 7*math.exp(-5))
    assert consistency_weight(3, 100., 0, .08) == 8.
    np.testing.assert_allclose([cosine_rampdown(e, 350) for e in (0, 30, 90, 180, 210, 300, 350, 900)],
        [1, .98198143, .845531325, .477567585, .345491503, .049515566, 0, 0], atol=1e-9)


# -- a consistency cost that has a gradient -------------------------------------------------------
class Blind(MeanTeacherCallback):
    "The mistake, put in on purpose: the student's unlabelled logits are read from the teacher's output."
    def loss_terms(self, logits):
        n = 0 if self.mixed else self.n_x
        return super().loss_terms(torch.cat([logits[:n], self.targets.log()]))

def consistency(cls, kind, moved, **kw):
    "The first consistency cost and its gradient by the student's weights, after the student alone was moved."
    cb, seen = cls(rampup=0, batchnorm='joint', **kw), {}
    terms = cb.loss_terms
    def look(logits):
        cost = terms(logits)['loss_u'][0]
        seen['cost'], seen['g'] = float(cost.detach()), 0.
        if cost.requires_grad:
            gs = torch.autograd.grad(cost, list(cb.learn.model.parameters()), allow_unused=True)
            seen['g'] = max(float(g.abs().max()) for g in gs if g is not None)
        seen['teacher'] = [p.grad for p in teacher_of(cb.learn).parameters()]
        raise CancelFitException
    cb.loss_terms = look
    def move(o):
        with torch.no_grad():
            for p in o.learn.model.parameters(): p.mul_(1 + moved)
    quiet_fit(learner([cb, Every('before_train', move)], loaders(kind)), 1)
    return seen

def check_that_the_student_pays(cls, kind, **kw):
    still, moved = consistency(cls, kind, 0., **kw), consistency(cls, kind, 1., **kw)
    assert still['g'] > 1e-7 and moved['g'] > 1e-7, 'no gradient reaches the student'
    assert moved['cost'] != still['cost'], 'the cost does not depend on the student'
    assert all(g is None for g in still['teacher'] + moved['teacher'])

@kinds
@pytest.mark.parametrize('distance', ['mse', 'kl'])
def test_the_student_pays(kind, distance): check_that_the_student_pays(MeanTeacherCallback, kind, distance=distance)

@kinds
def test_the_mistake_would_be_found(kind):
    with pytest.raises(AssertionError, match='no gradient'): check_that_the_student_pays(Blind, kind)
    assert consistency(Blind, kind, 1.)['cost'] < 1e-10

@kinds
def test_only_the_weight_decides(kind):
    "`w_max=0` trains as if there were no consistency cost; a weight above it changes the weights"
    def end(**kw): return weights(quiet_fit(learner([mean_teacher(rampup=0, **kw)], loaders(kind)), 1, 1e-2))
    a, b = end(w_max=0.), end(w_max=0., distance='kl')
    assert differences(a, b) == [] and differences(a, end(w_max=50.))


# -- the teacher ----------------------------------------------------------------------------------
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def diary(cb, kind, cbs=()):
    "The student's weights at the start and after each update, and the Learner."
    out = []
    now = lambda o: out.append(o.learn.model[1].weight.detach().clone())
    look = Every('after_step', now)
    learn = learner([*cb, Every('before_fit', now), *cbs], loaders(kind, 6), linear)
    learn.add_cb(look)
    quiet_fit(learn, 1, 1e-2)
    return out, learn

@kinds
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('skip', [False, True])
def test_recipes(kind, recipe, skip):
    "Also when a step in between is skipped: then nothing counts"
    def cancel(cb):
        if cb.train_iter == 2: raise CancelStepException
    class First(Every): order = 0
    out, learn = diary([mean_teacher(recipe=recipe, ema=.8)], kind, [First('before_step', cancel)] if skip else [])
    if skip: del out[3]
    assert learn.mean_teacher.n_step == learn.ema_teacher.n_updates == 6 - skip
    expected = out[0]
    for s,(before,after) in enumerate(zip(out, out[1:])):
        d = .8 if recipe == 'tensorflow' else warm_decay(s, .8)
        expected = d*expected + (1-d)*(before if recipe == 'tensorflow' else after)
    torch.testing.assert_close(teacher_of(learn)[1].weight, expected)

@kinds
@pytest.mark.parametrize('recipe', RECIPES)
def test_without_memory(kind, recipe):
    "`ema=0`: the teacher is the student, or the student of one update ago"
    out, learn = diary([mean_teacher(recipe=recipe, ema=0.)], kind)
    torch.testing.assert_close(teacher_of(learn)[1].weight, out[-2 if recipe == 'tensorflow' else -1])
    assert not torch.equal(out[-1], out[-2])

@kinds
@pytest.mark.parametrize('recipe', RECIPES)
def test_accumulated_gradients(kind, recipe):
    "Teacher, ramp and warm-up count updates, not batches"
    learn = learner([mean_teacher(recipe=recipe, rampup=1), GradientAccumulation(16 if kind == 'streams' else 32)], loaders(kind, 6))
    quiet_fit(learn, 1, 1e-2)
    assert learn.mean_teacher.n_step == learn.ema_teacher.n_updates == 3

@kinds
def test_own_teacher(kind):
    own = EMATeacher(partial(svhn_decay, rampup=2, early=0., late=1.), 'copy', before=True)
    out, learn = diary([own, mean_teacher(ema=.5)], kind)
    assert learn.ema_teacher is own and len(learn.cbs.filter(lambda cb: isinstance(cb, EMATeacher))) == 1
    torch.testing.assert_close(own.teacher[1].weight, out[1])   # copied twice, before the steps, then never again

def test_own_teacher_stays_when_the_method_goes():
    own = EMATeacher(.9)
    learn = learner([own])
    quiet_fit(learn, 1, cbs=mean_teacher())
    assert learn.ema_teacher is own and own.teacher is not None
    quiet_fit(learn, 1)

@kinds
@pytest.mark.parametrize('buffers', ['own', 'copy', 'average'])
def test_statistics(kind, buffers):
    "'own': from the teacher's forwards, one for each batch; else these leave no mark"
    own = EMATeacher(.9, buffers)
    learn = learner([own, mean_teacher()], loaders(kind), lambda: nn.Sequential(tiny_net()[:1], nn.BatchNorm2d(8, momentum=1.), *tiny_net()[2:]))
    seen, running = [], []
    def hook(cb):
        if not seen: own.teacher[1].register_forward_pre_hook(lambda m, i: seen.append(i[0].mean((0, 2, 3))) if m.training else None)
        seen.append(None)
    class Late(Every): order = EMATeacher.order+1
    learn.add_cb(Late('before_train', hook))
    learn.add_cb(Every('after_pred', lambda cb: running.append(own.teacher[1].running_mean.clone())))
    quiet_fit(learn, 1, 1e-2)
    assert len(seen) == 6 and len(running) == 5   # a forward for each batch
    alike = [torch.allclose(a, b, atol=1e-6) for a,b in zip(seen[1:], running)]
    assert all(alike) if buffers == 'own' else not any(alike)
    assert not own.teacher.training and all(not p.requires_grad and p.grad is None for p in own.teacher.parameters())
    if buffers == 'copy': assert torch.equal(own.teacher[1].running_mean, learn.model[1].running_mean)

def test_noise_is_independent():
    "Same weights, same view: dropout makes two answers"
    learn = quiet_fit(learner([mean_teacher(ema=0., recipe='pytorch')], model=noisy), 1, 1e-2)
    cb, x = learn.mean_teacher, torch.rand(8, 1, 8, 8)
    a, b = cb.ask_teacher(x), cb.ask_teacher(x)
    assert not torch.allclose(a, b) and not a.requires_grad and a.dtype == torch.float32
    assert not teacher_of(learn).training

@kinds
def test_who_answers(kind):
    "Validation and predictions are the teacher's, in evaluation mode"
    learn = quiet_fit(learner([mean_teacher()], loaders(kind), noisy), 2, 1e-1)
    with learn.no_bar(): preds = learn.get_preds()[0]
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b in learn.dls.valid])
    with torch.no_grad(): by_hand = teacher_of(learn)(x).softmax(1)
    torch.testing.assert_close(preds.as_subclass(torch.Tensor), by_hand)
    assert not torch.allclose(by_hand, learn.model.eval()(x).softmax(1))

@kinds
def test_batchnorm(kind):
    "Joint: one forward for the student; separate: one for each group; mixed batches have one group"
    for way,n in (('joint', 1), ('separate', 2 if kind == 'streams' else 1)):
        count, learn = [], learner([mean_teacher(batchnorm=way)], loaders(kind))
        learn.model.register_forward_hook(lambda m, i, o: count.append(len(o)) if m is learn.model and m.training else None)
        quiet_fit(learn, 1)
        assert len(count) == 5*n

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@kinds
@pytest.mark.parametrize('recipe', RECIPES)
def test_autocast(kind, recipe):
    types = []
    learn = learner([mean_teacher(recipe=recipe), MixedPrecision(AMPMode.BF16)], loaders(kind), opt_func=SGD)
    cb = learn.mean_teacher
    ask = cb.check_logits
    cb.check_logits = lambda z: types.append(z.dtype) or ask(z)
    learn.add_cb(Every('after_pred', lambda o: types.append(cb.targets.dtype)))
    quiet_fit(learn, 1, 1e-2)
    assert set(types[::3]) == {torch.bfloat16} and set(types[2::3]) == {torch.float32}
    assert learn.ema_teacher.n_updates == 5 and not torch.is_autocast_enabled('cpu')


# -- what looks changes nothing -------------------------------------------------------------------
def everything(learn):
    cb = learn.mean_teacher.state_dict()
    return dict(model=weights(learn), teacher=learn.ema_teacher.state_dict(), n=cb['n_step'],
                stream=None if cb['stream'] is None else str(cb['stream']))

@kinds
@pytest.mark.parametrize('trained', [False, True])
def test_lr_find(kind, trained):
    "Before the first `fit` there is no teacher and the student stands in; after it the teacher's statistics stay, too"
    learn = learner([mean_teacher()], loaders(kind))
    if trained: quiet_fit(learn, 1, 1e-2)
    before, state = weights(learn), {}
    if trained: state = {k: v.clone() for k,v in teacher_of(learn).state_dict().items()}
    n = learn.mean_teacher.n_step, learn.ema_teacher.n_updates
    with learn.no_bar(): learn.lr_find(num_it=12, end_lr=1e-2, stop_div=False, show_plot=False)
    assert differences(before, weights(learn)) == []
    assert (learn.mean_teacher.n_step, learn.ema_teacher.n_updates) == n
    if trained: assert differences(state, dict(teacher_of(learn).state_dict())) == []
    else: assert teacher_of(learn) is None
    for m in learn.model.modules(): assert getattr(m, 'track_running_stats', True)
    quiet_fit(learn, 1)

@kinds
def test_looking(kind):
    learn = quiet_fit(learner([mean_teacher()], loaders(kind)), 1, 1e-2)
    before = weights(learn), weights(teacher_of(learn))
    with learn.no_bar(), learn.no_logging(): learn.validate(), learn.get_preds()
    assert differences(before, (weights(learn), weights(teacher_of(learn)))) == []

@kinds
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step'])
def test_cancelled_or_interrupted(kind, event):
    "The Learner is whole, and nothing of the last batch is kept"
    learn = learner([mean_teacher()], loaders(kind))
    model = learn.model
    def stop(cb):
        if cb.train_iter == 2: raise CancelFitException
    quiet_fit(learn, 1, cbs=Every(event, stop))
    assert learn.model is model and all(p.requires_grad for p in model.parameters())
    cb = learn.mean_teacher
    assert not [k for k in ('targets', 'labels', 'chunks', 'total') if k in vars(cb)]
    learn.remove_cbs(Every)
    quiet_fit(learn, 1)
    quiet_fit(learn, 1)


# -- killed and resumed ---------------------------------------------------------------------------
def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def block_dls(bs=8):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(40, 60)), item_tfms=[Resize(16), RandomCrop(14)], batch_tfms=aug_transforms(size=14))
    return block.dataloaders(list(range(60)), bs=bs, num_workers=0, device='cpu')

def resumable(kind, recipe, folder):
    cb, ck = mean_teacher(recipe=recipe), Checkpoint(folder, every=2, keep=2)
    if kind == 'block':
        random.seed(0); torch.manual_seed(0)
        dls = block_dls()
        cb.unlabeled = unlabeled_dl(dls, list(range(100, 160)), num_workers=0)
        return learner([cb, ck], dls, partial(noisy, channels=3))
    return learner([cb, ck], loaders(kind), noisy)

@linux
@pytest.mark.parametrize('kind, recipe, event, n', [
    ('streams', 'tensorflow', 'after_loss', 7), ('streams', 'pytorch', 'before_step', 5), ('mixed', 'tensorflow', 'after_step', 8),
    ('mixed', 'pytorch', 'after_batch', 4), ('block', 'pytorch', 'after_pred', 7)])
def test_killed(kind, recipe, event, n, tmp_path):
    "With dropout in both towers; bit for bit"
    count = [0]
    def kill(cb):
        count[0] += 1
        if count[0] == n: die()
    a = quiet_fit(resumable(kind, recipe, tmp_path/'a'), 2, 1e-2)
    assert in_child(lambda: quiet_fit(resumable(kind, recipe, tmp_path/'b'), 2, 1e-2, cbs=Every(event, kill))) == signal.SIGKILL
    b = quiet_fit(resumable(kind, recipe, tmp_path/'b'), 2, 1e-2)
    whole, resumed = (read_checkpoint(l.checkpoint.files()[-1]) for l in (a, b))
    assert differences(whole, resumed) == []
    assert differences(weights(teacher_of(a)), weights(teacher_of(b))) == []

def test_interrupted_with_a_teacher_of_ones_own(tmp_path):
    def make(d):
        own = EMATeacher(partial(svhn_decay, rampup=4, early=.5, late=.9), 'average')
        return learner([own, mean_teacher(), Checkpoint(d, every=2)], loaders('mixed'), noisy)
    def stop(cb):
        if cb.train_iter == 7: raise KeyboardInterrupt
    a = quiet_fit(make(tmp_path/'a'), 2, 1e-2)
    with pytest.raises(KeyboardInterrupt): quiet_fit(make(tmp_path/'b'), 2, 1e-2, cbs=Every('after_batch', stop))
    b = quiet_fit(make(tmp_path/'b'), 2, 1e-2)
    assert differences(weights(teacher_of(a)), weights(teacher_of(b))) == [] == differences(weights(a), weights(b))

def test_checkpoint_of_another_network(tmp_path):
    quiet_fit(resumable('mixed', 'pytorch', tmp_path), 1)
    for net in (lambda: nn.Sequential(*tiny_net(dropout=.3)[:-1], nn.Linear(8, 10, bias=False)), lambda: tiny_net(channels=1)[3:]):
        learn = learner([mean_teacher(recipe='pytorch'), Checkpoint(tmp_path, every=2)], loaders('mixed'), net)
        with pytest.raises(ValueError, match='another model.*choose another folder'): quiet_fit(learn, 1)

def test_checkpoint_of_other_data(tmp_path):
    def make(dls): return learner([mean_teacher(), Checkpoint(tmp_path, every=2)], dls, noisy)
    def stop(cb):
        if cb.train_iter == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet_fit(make(mixed()), 2, cbs=Every('after_batch', stop))
    fewer = ImageDL(mixed().train.dataset.subset(slice(0, 900)), 16, True, 5, index=True, augment=weak_augment('digits'))
    dls = DataLoaders(fewer, mixed().valid)
    dls.c = 10
    with pytest.raises(ValueError, match='900'): quiet_fit(make(dls), 2)

@pytest.mark.parametrize('share', [.3, .95])
def test_truncated_checkpoint(share, tmp_path):
    learn = quiet_fit(resumable('mixed', 'pytorch', tmp_path), 1)
    f = learn.checkpoint.files()[-1]
    f.write_bytes(f.read_bytes()[:int(f.stat().st_size*share)])
    with pytest.raises(ValueError, match='not a whole checkpoint'): quiet_fit(resumable('mixed', 'pytorch', tmp_path), 1)


# -- bad input ------------------------------------------------------------------------------------
def refused(learn, *words, error=ValueError, n_epoch=1):
    before = weights(learn)
    with pytest.raises(error) as e: quiet_fit(learn, n_epoch, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    return differences(before, weights(learn))

class Items:
    "Float images with labels: what a fastai loader of a user's own may give"
    def __init__(self, n=40, shape=(1, 8, 8), dtype=torch.float32):
        self.x, self.y = torch.rand(n, *shape).to(dtype), torch.arange(n) % 10
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]

def own_dls(train=None, bs=8):
    one = lambda items, shuffle: TfmdDL(items, bs=bs, shuffle=shuffle, drop_last=shuffle, num_workers=0)
    dls = DataLoaders(one(train or Items(), True), one(Items(16), False))
    dls.c = 10
    return dls

def stream(bs=8, **kw): return TfmdDL(Items(**kw), bs=bs, shuffle=True, drop_last=True, num_workers=0)

@pytest.mark.parametrize('kw', [dict(ema=None), dict(ema=1.5), dict(ema=-.1), dict(ema=float('nan')), dict(recipe='jax'),
    dict(recipe=None), dict(distance='l1'), dict(batchnorm='interleave'), dict(w_max=-1.), dict(w_max=float('nan')),
    dict(w_max=float('inf')), dict(rampup=-1), dict(rampup=float('nan'))], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError) as e: MeanTeacherCallback(**kw)
    assert name in str(e.value).split(':')[0] and str(value) in str(e.value) and ('expected' in str(e.value) or 'give' in str(e.value))

@kinds
def test_ramp_longer_than_the_training(kind):
    assert refused(learner([MeanTeacherCallback()], loaders(kind)), 'rampup: got 40000 updates', 'has 5') == []
    quiet_fit(learner([mean_teacher(rampup=5)], loaders(kind)), 1)
    learn = quiet_fit(learner([mean_teacher(rampup=8)], loaders(kind)), 2)
    quiet_fit(learn, 1)   # the ramp is over: a short second fit is none of its business

def test_no_unlabelled_data():
    assert refused(learner([mean_teacher()], own_dls()), 'unlabeled: MeanTeacherCallback has no unlabelled data', 'pass a loader') == []

@pytest.mark.parametrize('kw, words', [(dict(shape=(1, 12, 12)), '(1, 12, 12)'), (dict(shape=(3, 8, 8)), '(3, 8, 8)'),
                                       (dict(dtype=torch.float64), 'float64'), (dict(dtype=torch.uint8), 'uint8')])
def test_unlike_images(kw, words):
    assert refused(learner([mean_teacher(stream(**kw))], own_dls()), 'both must be alike', words) == []

def test_sizes():
    refused(learner([mean_teacher(stream())], own_dls(bs=1)), 'a batch of one labelled image')
    refused(learner([mean_teacher(stream(bs=1))], own_dls()), 'batch size is 1', 'at least 2')
    refused(learner([mean_teacher(stream(n=5, bs=8))], own_dls()), '5 images do not fill one batch of 8', 'bs=5')
    for way in ('joint', 'separate'):   # batches of two sizes are fine
        quiet_fit(learner([mean_teacher(stream(bs=12), batchnorm=way)], own_dls()), 1)

@pytest.mark.parametrize('label', [10, -1])
def test_label_outside_the_classes(label):
    items = Items()
    items.y = torch.full_like(items.y, label)
    refused(learner([mean_teacher(stream())], own_dls(items)), 'label lies outside the 10 classes', error=(ValueError, FloatingPointError))

@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
def test_bad_pixels(where):
    labelled, unlabelled = Items(), Items()
    dict(labelled=labelled, unlabelled=unlabelled)[where].x[:, 0, 2, 2] = float('nan')
    unl = TfmdDL(unlabelled, bs=8, shuffle=True, drop_last=True, num_workers=0)
    refused(learner([mean_teacher(unl)], own_dls(labelled)), f'the {where} images are not finite', error=FloatingPointError)

@kinds
def test_bad_teacher(kind):
    "A teacher that gives no numbers shows in the consistency cost"
    def spoil(cb):
        with torch.no_grad(): teacher_of(cb.learn)[-1].weight.fill_(float('nan'))
    class Late(Every): order = 95
    learn = learner([mean_teacher(), Late('before_train', spoil)], loaders(kind))
    refused(learn, 'step 0: the loss term loss_u is not finite', error=FloatingPointError)

@pytest.mark.parametrize('c', [9, 11])
@kinds
def test_wrong_number_of_outputs(kind, c):
    "No weight has moved (the teacher is asked first)"
    assert refused(learner([mean_teacher()], loaders(kind), partial(tiny_net, c)), 'for 10 classes', 'must have 10 outputs') == []

@pytest.mark.parametrize('other', [partial(tiny_net, 10), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
def test_swapped_model(other):
    "A network of the same shape goes on with the teacher; another one is refused, with the way out"
    learn = quiet_fit(learner([mean_teacher()]), 1)
    learn.model = other()
    learn.create_opt()
    if len(learn.model) > 2:
        quiet_fit(learn, 1)
        return
    refused(learn, "differs from the teacher's architecture", 'learn.ema_teacher.reset()')
    learn.ema_teacher.reset()
    quiet_fit(learn, 1)
    assert isinstance(teacher_of(learn)[1], nn.Linear)

def test_two_teachers():
    refused(learner([mean_teacher(), EMATeacher(.9)]), 'there are two teachers', 'before the method')

def test_no_teacher_left():
    learn = learner([mean_teacher()])
    learn.remove_cbs(learn.cbs.filter(lambda cb: isinstance(cb, EMATeacher)))
    refused(learn, 'the teacher was taken off this Learner')

def test_train_metrics_on_mixed_batches():
    learn = learner([mean_teacher()], mixed())
    learn.recorder.train_metrics = True
    refused(learn, 'train_metrics')


# -- fastai's own loaders and networks ------------------------------------------------------------
def test_pictures(tmp_path):
    random.seed(0); torch.manual_seed(0)
    dls = block_dls(16)
    unl = unlabeled_dl(dls, list(range(100, 160)), num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=mean_teacher(unlabeled=unl, recipe='pytorch', rampup=2))
    learn.path = tmp_path
    quiet_fit(learn, 1, 1e-3)
    assert learn.mean_teacher.n_step == 2 and all(map(np.isfinite, learn.recorder.values[-1]))
    with learn.no_bar(): was = learn.get_preds()[0]
    assert differences(weights(learn), weights(teacher_of(learn)))
    learn.ema_teacher.adopt()
    learn.remove_cb(MeanTeacherCallback)
    assert not hasattr(learn, 'ema_teacher')
    with learn.no_bar(): assert torch.equal(was, learn.get_preds()[0])

@kinds
@pytest.mark.parametrize('recipe', RECIPES)
def test_export(kind, recipe, tmp_path):
    "Loaded elsewhere, the teacher still answers; no images and no batch are in the file"
    learn = quiet_fit(learner([mean_teacher(recipe=recipe)], loaders(kind), noisy, path=tmp_path), 1, 1e-1)
    x = next(iter(learn.dls.valid))[0].as_subclass(torch.Tensor)
    with torch.no_grad(): was = teacher_of(learn)(x)
    learn.export(tmp_path/'a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    cb = again.mean_teacher
    assert not [k for k in ('stream', 'unlabeled', 'targets', 'labels', 'chunks') if vars(cb).get(k) is not None]
    with torch.no_grad(): assert torch.equal(was, teacher_of(again)(x))
    assert again.ema_teacher.n_updates == 5 and cb.recipe == recipe
