"What the page `03_core` cannot say in passing about strong views, mixed batches, first forwards, ramps and teachers."
from functools import partial

import fastai.callback.schedule # lr_find
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from fastai.data.core import TfmdDL
from fastai.data.transforms import IntToFloatTensor
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage

from ssl_notes.augment import weak_augment
from ssl_notes.core import EMATeacher, MixedStream, SemiSupervised, ViewStream, frozen_bn_stats, ramped_schedule
from ssl_notes.data import ImageDL, ImageSet, get_dls, mixed_dls
from ssl_notes.mixmatch import MixMatchCallback

from helpers import DIGITS, Every, differences, digits_dls, learner, quiet_fit, tiny_net, weights

def invert(x, generator=None): return 255 - x
def noisy(x, generator): return torch.randint(0, 256, x.shape, generator=generator).byte()
def numbered(n): return ImageSet(torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 1, 2, 2).contiguous())

class Items:
    "A data set as fastai's loaders know it: uint8 pictures whose value is their number."
    n_inp = 1
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return (TensorImage(torch.full((1, 2, 2), i, dtype=torch.uint8)),)

class Halve:
    "A network that is easily read: the mean of its picture, for every class."
    def __new__(cls, c=10): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, c))

class Plain(SemiSupervised):
    "The smallest method: cross-entropy where a label is known, mean square of the rest."
    terms, can_mix = ('loss_x', 'loss_u'), True
    def __init__(self, batchnorm='joint', K=1, **kw):
        super().__init__(K=K, **kw)
        self.batchnorm, self.seen = batchnorm, []
    def make_batch(self, x, y, views, idx):
        self.targets = y
        self.seen.append((x.clone(), y.clone(), views.clone(), idx.clone()))
        return self.first_forward(*views) if self.mixed else self.first_forward(x, *views)
    def loss_terms(self, logits):
        x, u = logits[:self.n_x], logits if self.mixed else logits[self.n_x:]
        return dict(loss_x=(-(self.targets*x.log_softmax(1)).sum()/len(x), 1.), loss_u=((u**2).mean(), .1))


# -- strong views ---------------------------------------------------------------------------------
@pytest.mark.parametrize('workers', [None, 0, 2])
@pytest.mark.parametrize('K', [1, 2, 3])
def test_first_view_stays_weak(workers, K):
    if workers is None: dl = ImageDL(numbered(12), bs=4, steps=2, index=True)
    else: dl = TfmdDL(Items(12), bs=4, after_batch=[IntToFloatTensor], num_workers=workers)
    stream = ViewStream(dl, K, strong=invert)
    for _ in range(4):
        views, idx = next(stream)
        assert views.shape == (K, 4, 1, 2, 2) and views.dtype == torch.float32
        assert torch.equal((views[0, :, 0, 0, 0]*255).round().long(), idx.cpu())
        for v in views[1:]: assert torch.allclose(v, 1 - views[0], atol=1e-6)
    stream.it = None   # the workers end here and not when the interpreter does

@pytest.mark.parametrize('own', [True, False])
def test_strong_views_go_on_where_they_stopped(own):
    def make():
        dl = ImageDL(numbered(12), bs=4, steps=2, index=True) if own else TfmdDL(Items(12), bs=4, after_batch=[IntToFloatTensor])
        return ViewStream(dl, 2, seed=3, strong=noisy)
    a, b = make(), make()
    for _ in range(3): next(a)
    b.load_state_dict(a.state_dict())
    for _ in range(4): assert not differences(list(next(a)), list(next(b)))

def test_strong_needs_bytes():
    class Floats(Items):
        def __getitem__(self, i): return (super().__getitem__(i)[0].float()/255,)
    stream = ViewStream(TfmdDL(Floats(12), bs=4), 2, strong=invert)
    with pytest.raises(TypeError, match='strong: it works on uint8.*IntToFloatTensor'): next(stream)


# -- mixed batches --------------------------------------------------------------------------------
def mixed(n=40, bs=32, seed=0, **kw): return mixed_dls(DIGITS, n, seed, bs=bs, device='cpu', **{**dict(augment=weak_augment('digits')), **kw})

@settings(deadline=None, max_examples=20)
@given(st.sampled_from([10, 40, 100, None]), st.integers(0, 50), st.integers(2, 200), st.booleans())
def test_mixed_labels_are_those_of_the_split(n, seed, bs, held):
    valid = 100 if held else None
    dls = mixed(n if not held else n or 40, bs, seed, valid=valid)
    train = dls.train.dataset
    known = train.y >= 0
    assert len(train) == 1300 - (100 if held else 0) and len(dls.train) == len(train)//bs
    assert int(known.sum()) == (n or (40 if held else 1300))
    lab = get_dls(DIGITS, n or (40 if held else None), seed, bs=2, valid=valid, device='cpu').train.dataset
    key = lambda s: sorted(map(tuple, torch.cat([s.x.flatten(1).long(), s.y[:, None]], 1).tolist()))
    assert key(train.subset(known)) == key(lab)

def test_epoch_is_one_pass():
    cb = Plain(K=2)
    quiet_fit(learner(cb, mixed(bs=130)), 2, 1e-3)
    for e in range(2):
        idx = torch.cat([s[3] for s in cb.seen[e*10:e*10+10]])
        assert torch.equal(idx.sort()[0], torch.arange(1300))

def test_mixed_batch_is_what_it_says():
    cb, dls = Plain(K=3), mixed(100)
    quiet_fit(learner(cb, dls), 1, 1e-3)
    for x, y, views, idx in cb.seen:
        assert torch.equal(x, views[0]) and not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
        known = dls.train.dataset.y[idx]
        assert torch.equal(y.sum(1) > 0, known >= 0) and torch.equal(y.argmax(1)[known >= 0], known[known >= 0])
    plain = mixed(100, augment=None)
    cb = Plain(K=2)
    quiet_fit(learner(cb, plain), 1, 1e-3)
    for x, _, views, idx in cb.seen: assert torch.equal(views[0], views[1]) and torch.equal((x*255).round().byte(), plain.train.dataset.x[idx])

def test_mixed_batches_want_a_method_that_can():
    with pytest.raises(ValueError, match='dls.train: it mixes.*MixMatchCallback.*get_dls'):
        quiet_fit(learner(MixMatchCallback(rampup=0), mixed()), 1, 1e-3)
    with pytest.raises(ValueError, match='train_metrics'):
        learn = learner(Plain(), mixed())
        learn.recorder.train_metrics = True
        quiet_fit(learn, 1, 1e-3)
    dls = mixed()
    dls.train.dataset.y.fill_(-1)
    with pytest.raises(ValueError, match='not one of its labels is known.*mixed_dls'): quiet_fit(learner(Plain(), dls), 1, 1e-3)

def test_mixed_validation_and_predictions():
    learn = quiet_fit(learner(Plain(), mixed()), 1, 1e-3)
    with learn.no_bar():
        p, y = learn.get_preds()
        assert p.shape == (497, 10) and torch.equal(y.cpu().long(), DIGITS.test.y)
        assert abs(learn.validate()[1] - float((p.argmax(1) == y).float().mean())) < 1e-6

def test_mixed_lr_find_leaves_no_trace():
    cb = Plain(K=2)
    learn = learner(cb, mixed())
    quiet_fit(learn, 1, 1e-3)
    before = weights(learn), cb.state_dict()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
    assert not differences(before, (weights(learn), cb.state_dict()))

def test_state_of_another_kind_of_batch_is_refused():
    a, b = Plain(), Plain()
    quiet_fit(learner(a, mixed()), 1, 1e-3)
    b.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match='unlabeled: the checkpoint'): quiet_fit(learner(b), 1, 1e-3)
    c, d = Plain(), Plain()
    quiet_fit(learner(c), 1, 1e-3)
    d.load_state_dict(c.state_dict())
    with pytest.raises(ValueError, match='dls.train: the checkpoint'): quiet_fit(learner(d, mixed()), 1, 1e-3)


# -- forwards -------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [digits_dls, mixed])
def test_separate_and_joint_agree_without_batchnorm(make):
    def run(batchnorm):
        cb = Plain(batchnorm, K=2)
        return weights(quiet_fit(learner(cb, make(), Halve), 1, 1e-2))
    a, b = run('separate'), run('joint')
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)

def test_only_the_first_forward_moves_the_statistics():
    cb = Plain('separate', K=2)
    learn = learner(cb, opt_func=partial(SGD))
    quiet_fit(learn, 1, 0.)
    bn, n = learn.model[1], 4   # four steps, momentum .1
    mean = torch.zeros(8)
    with torch.no_grad():
        for x, *_ in cb.seen: mean = .9*mean + .1*learn.model[0](x).mean((0, 2, 3))
    assert torch.allclose(bn.running_mean, mean, atol=1e-6) and int(bn.num_batches_tracked) == n

def test_frozen_stats_goes_by_the_attribute():
    class Own(nn.Module):
        track_running_stats = True
    m = nn.Sequential(Own(), nn.BatchNorm1d(2), nn.InstanceNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True))
    with frozen_bn_stats(m): assert [o.track_running_stats for o in m] == [False]*4
    assert [o.track_running_stats for o in m] == [True, True, False, True]


# -- ramps ----------------------------------------------------------------------------------------
class Ramped(Plain):
    def __init__(self, length, unit, **kw):
        super().__init__(**kw)
        self.length, self.unit = length, unit
    def before_train(self):
        super().before_train()
        self.check_ramp('rampup', self.length, self.unit)

@pytest.mark.parametrize('length, unit, ok', [(8, 1, True), (9, 1, False), (2, 4, True), (3, 4, False), (0, 1, True)])
def test_ramp_must_end_with_the_training(length, unit, ok):   # two epochs of four steps
    fit = lambda: quiet_fit(learner(Ramped(length, unit)), 2, 1e-3)
    if ok: fit()
    else:
        with pytest.raises(ValueError, match=r'rampup: got.*the training has \d+.*give rampup=\d'): fit()

def test_ramp_counts_what_was_trained_before():
    learn = quiet_fit(learner(Ramped(8, 1)), 2, 1e-3)
    quiet_fit(learn, 1, 1e-3)

@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1), st.floats(0, 100), st.floats(0, 100), st.floats(0, 100), st.booleans())
def test_ramped_schedule(pct, up, down, rest, whole):
    total = up + down + rest + 1
    s = ramped_schedule(.003, total, up, down, whole=whole).scheds
    assert 0 < s['lr'](pct) <= .003 and .5 <= s['mom'](pct) <= .9 + 1e-9
    if not whole and up/total < pct < (up + rest)/total: assert s['lr'](pct) == pytest.approx(.003) and s['mom'](pct) == pytest.approx(.9)

def test_ramped_schedule_drives_the_optimiser():
    learn = learner(Plain())
    seen = []
    cbs = [ramped_schedule(.01, 3, 1, 1, whole=True), Every('after_step', lambda cb: seen.append((cb.opt.hypers[-1]['lr'], cb.opt.hypers[-1]['mom'])))]
    quiet_fit(learn, 3, cbs=cbs)
    lr, mom = zip(*seen)
    assert lr[:4] == pytest.approx([.01*2.718281828459045**-5]*4) and lr[4:8] == pytest.approx([.01]*4) and lr[8:] == pytest.approx([.01]*4)
    assert mom == pytest.approx([.9]*12)   # at whole epochs the ramp-down of the last one has not begun


# -- the teacher ----------------------------------------------------------------------------------
class Walk(Callback):
    "Sets the only weight to 1, 0, -1, ... in place of the optimiser's step."
    order = 80
    def __init__(self): self.values = [0., -1., -2.]
    def after_step(self):
        with torch.no_grad():
            for p in self.model.parameters(): p.fill_(self.values[self.train_iter])

@pytest.mark.parametrize('before, expected', [(True, [1., .9]), (False, [.9, .71])])
def test_before_or_after_the_step(before, expected):
    t, got = EMATeacher(.9, before=before), []
    learn = learner([t, Walk(), Every('after_batch', lambda cb: got.append(next(t.teacher.parameters()).flatten()[0].item()) if cb.training else None)],
                    digits_dls(steps=2), opt_func=partial(SGD))
    with torch.no_grad():
        for p in learn.model.parameters(): p.fill_(1.)
    quiet_fit(learn, 1, 0.)
    assert got == pytest.approx(expected)

def test_decay_may_be_a_function():
    t = EMATeacher(lambda n: 0. if n < 4 else 1.)
    learn, kept = learner(t), []
    keep = Every('after_batch', lambda cb: kept.append(weights(cb.model)) if cb.training else None)
    quiet_fit(learn, 2, 1e-2, cbs=[keep])
    params = dict(t.teacher.named_parameters())
    assert all(torch.equal(params[k], kept[3][k]) for k in params) and t.n_updates == 8
    with pytest.raises(ValueError, match='decay: got 1.5'): EMATeacher(lambda n: 1.5)

@pytest.mark.parametrize('before', [True, False])
def test_skipped_and_accumulated_steps_do_not_count(before):
    class Skip(Callback):
        def before_step(self):
            if self.train_iter % 2: raise CancelStepException
    t = EMATeacher(.9, before=before)
    quiet_fit(learner([t, Skip()]), 2, 1e-2)
    assert t.n_updates == 4
    t = EMATeacher(.9, before=before)
    quiet_fit(learner([t, GradientAccumulation(16)]), 2, 1e-2)
    assert t.n_updates == 4
