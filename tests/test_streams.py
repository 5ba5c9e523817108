"What the page `03_core` cannot say in passing about strong views, mixed batches, first forwards, ramps, teachers and policies."
import math
from copy import deepcopy
from functools import partial

import fastai.callback.schedule # lr_find
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage

from ssl_notes.augment import weak_augment
from ssl_notes.core import (EMATeacher, SemiSupervised, ViewStream, frozen_bn_stats, global_mean, one_hot,
                            ramped_schedule, right_rate)
from ssl_notes.ctaugment import CTAugment
from ssl_notes.data import ImageDL, ImageSet, get_dls, mixed_dls
from ssl_notes.fixmatch import freematch_update
from ssl_notes.mixmatch import MixMatchCallback
from ssl_notes.remixmatch import ReMixMatchCallback

from helpers import DIGITS, Every, differences, digits_dls, gloo, learner, linux, quiet_fit, two_processes, weights

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


# -- shares and means -----------------------------------------------------------------------------
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3), st.booleans()), min_size=1, max_size=20))
def test_right_rate_against_a_loop(rows):
    "Right and kept among those of known class, `nan` if there is none; without a mask every row counts"
    guess, truth, mask = (torch.tensor(o) for o in zip(*rows))
    for kept,got in ((mask.tolist(), right_rate(guess, truth, mask.float())), ([True]*len(rows), right_rate(guess, truth))):
        known = [(g == t and k) for (g, t, _),k in zip(rows, kept) if t >= 0]
        assert got.ndim == 0 and (math.isnan(got) if not known else math.isclose(float(got), sum(known)/len(known), rel_tol=1e-6))

def test_global_mean_alone():
    x = torch.rand(3, requires_grad=True)
    assert global_mean(x) is x

@linux
@gloo
def test_global_mean_of_two_processes(tmp_path):
    "The argument stays as it was, and no gradient comes along"
    def f(rank):
        x = torch.tensor([1., 10.])*(rank + 1)
        w = x.clone().requires_grad_()
        return global_mean(x), x, global_mean(w*2).requires_grad, global_mean(torch.tensor(float(rank), dtype=torch.float64))
    for rank,(mean, x, grad, half) in enumerate(two_processes(f, tmp_path)):
        assert mean.tolist() == [1.5, 15.] and x.tolist() == [rank + 1., 10.*(rank + 1)] and not grad
        assert half == .5 and half.dtype == torch.float64

@linux
@gloo
def test_what_all_processes_share(tmp_path):
    "Two processes with other data and other weights: what the methods average is the same in both, and is the mean of both"
    q = [torch.randn(6, 10, generator=torch.Generator().manual_seed(r)).softmax(1) for r in range(2)]
    y = [one_hot(torch.arange(6) % (r + 2), 10) for r in range(2)]
    class Fixed(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p, self.head = p, nn.Linear(1, 10)
        def forward(self, x): return self.p.log()
    def f(rank):
        cb = ReMixMatchCallback(K=1, rampup=0)
        quiet_fit(learner([cb]), 1, 1e-3)
        cb.learn.model, cb.fifo, cb.p_data = Fixed(q[rank]), torch.full((128, 10), .1), torch.full((10,), .1)
        cb.guess(torch.zeros(6, 1, 8, 8), y[rank])
        for p in cb.head.parameters(): p.grad = torch.full_like(p, rank + 1.)
        cb.before_step()
        free = freematch_update((torch.tensor(.1), *torch.full((2, 10), .1)), q[rank], .5)
        return cb.fifo[-1], cb.p_data, [p.grad.unique() for p in cb.head.parameters()], free
    a, b = two_processes(f, tmp_path)
    assert not differences(a, b)
    both = torch.cat(q)
    torch.testing.assert_close(a[0], both.mean(0))
    torch.testing.assert_close(a[1], .999*torch.full((10,), .1) + .001*torch.cat(y).mean(0))
    assert [g.tolist() for g in a[2]] == [[1.5], [1.5]]
    for got,old,now in zip(a[3], (.1, .1, .1), (both.amax(1).mean(), both.mean(0), one_hot(both.argmax(1), 10).mean(0))):
        torch.testing.assert_close(got, torch.as_tensor(.5*old + .5*now))


# -- a policy beneath the loaders' Normalize ------------------------------------------------------
class Policy:
    "Draws, learns and keeps what it saw."
    def __init__(self): self.seen, self.rate = [], torch.ones(2)
    def __call__(self, x, generator):
        self.seen.append(x)
        return 1 - x if generator is None else (x + .25*torch.rand(len(x), 1, 1, 1, generator=generator)).clamp(0, 1)
    def state_dict(self): return dict(rate=self.rate.clone())
    def load_state_dict(self, state): self.rate = state['rate'].clone()

class Probing(Policy):
    def probe(self, x, generator):
        self.probed = 1 - x
        return self.probed, torch.full((len(x), 1), torch.randint(2, (1,), generator=generator).item())
    def update(self, used, omega):
        self.used, self.omega = used, omega
        self.rate[used[0, 0]] = .9*self.rate[used[0, 0]] + .1*omega.mean()

class Strong(SemiSupervised):
    "Two views, the second made strong."
    terms, n_views = ('loss_x', 'loss_u'), 2
    def __init__(self, policy, ema=.9, **kw):
        super().__init__(ema=ema, **kw)
        self.policy, self.rows = policy, []
    def make_batch(self, x, y, views, idx):
        self.targets = y
        self.probe(x, y)
        rows = torch.cat([x, views[0], self.strengthen(views[1])])
        self.rows.append((x, views, rows[-len(idx):]))
        return rows
    def loss_terms(self, logits):
        x, weak, strong = logits.split([self.n_x, *[(len(logits) - self.n_x)//2]*2])
        return dict(loss_x=(-(self.targets*x.log_softmax(1)).sum(1).mean(), 1.), loss_u=(((weak - strong)**2).mean(), .1))

class Pictures:
    "Images in [0,1] or elsewhere, with labels."
    def __init__(self, n=40, scale=1., shift=0., seed=0):
        self.x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))*scale + shift
        self.y = torch.arange(n) % 10
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(self.x[i]), self.y[i]

def normal_dls(norms=((.4, .2),), **kw):
    tfms = [Normalize(*(torch.full((1, 1, 1, 1), o) for o in ms)) for ms in norms]
    one = lambda seed, train: TfmdDL(Pictures(seed=seed, **kw), bs=8, shuffle=train, drop_last=train, num_workers=0, after_batch=tfms)
    dls = DataLoaders(one(0, True), one(1, False))
    dls.c, dls.unlabeled = 10, one(2, True)
    return dls

@pytest.mark.parametrize('norms', [(), ((.4, .2),), ((.4, .2), (-1., 3.))], ids=str)
def test_policy_works_beneath_normalize(norms):
    "It sees the pictures, and its result comes back as the loaders would give it; also beneath two of them"
    cb = Strong(policy := Probing())
    quiet_fit(learner([cb], normal_dls(norms)), 1, 1e-3)
    assert len(policy.seen) == 5 and all(type(o) is torch.Tensor for o in policy.seen)
    x, views, strong = cb.rows[-1]
    plain, back = views[1], strong
    for mean,std in reversed(norms): plain, back = plain*std + mean, back*std + mean
    torch.testing.assert_close(policy.seen[-1], plain)
    assert 0 <= plain.min() and plain.max() <= 1 and (plain.min() < .05) and (plain.max() > .95)
    more = (back - plain).clamp(0)[:, 0, 0, 0]
    assert more.max() > .02 and back.max() < 1.001
    if norms: assert float((views[1]).amin()) < -.1   # the network's images are not pictures
    for mean,std in reversed(norms): x = x*std + mean
    torch.testing.assert_close(policy.probed, 1 - x)

def test_probe_asks_the_averaged_network():
    "In evaluation mode, about labelled images; the policy hears the share of the right class"
    class Asking(Strong):
        def probe(self, x, y):
            super().probe(x, y)
            t = self.learn.ema_teacher.teacher
            assert not t.training
            with torch.no_grad(): p = t((self.policy.probed - .4)/.2).softmax(1)
            torch.testing.assert_close(self.policy.omega, (p*y).sum(1), rtol=1e-3, atol=1e-5)
            self.asked = getattr(self, 'asked', 0) + 1
    learn = quiet_fit(learner([cb := Asking(Probing())], normal_dls()), 2, 1e-2)
    assert cb.asked == 10 and not torch.equal(cb.policy.rate, torch.ones(2)) and not cb.policy.omega.requires_grad
    assert all(p.grad is None for p in learn.ema_teacher.teacher.parameters())

def test_probe_without_a_teacher():
    learn = learner([Strong(Probing(), ema=None)], normal_dls())
    before = weights(learn)
    with pytest.raises(ValueError, match='ema: this policy asks the averaged network; give `ema` a decay'): quiet_fit(learn, 1, 1e-3)
    assert differences(before, weights(learn)) == []
    quiet_fit(learner([Strong(Policy(), ema=None)], normal_dls()), 1, 1e-3)   # one that does not ask needs none
    quiet_fit(learner([EMATeacher(.5), Strong(Probing(), ema=None)], normal_dls()), 1, 1e-3)   # nor with one of your own

def test_update_of_no_rows():
    with pytest.raises(ValueError, match='B at least 1'): CTAugment().update(torch.zeros(0, 4).long(), torch.zeros(0))

@pytest.mark.parametrize('kw, fine', [(dict(), True), (dict(scale=.5), True), (dict(scale=2.), False), (dict(scale=255.), False),
                                      (dict(shift=-.5), False)], ids=str)
@pytest.mark.parametrize('norms', [(), ((.4, .2),)], ids=str)
def test_images_outside_of_the_unit_range(kw, fine, norms):
    learn = learner([Strong(Policy())], normal_dls(norms, **kw))
    if fine: return quiet_fit(learn, 1, 1e-3) and None
    with pytest.raises(ValueError, match=r'step 0: strong: the images leave \[0,1\].*Normalize'): quiet_fit(learn, 1, 1e-3)

def test_state_of_a_policy():
    "Generator and rates go into the state and come back"
    a, b = Strong(Probing()), Strong(Probing(), seed=5)
    quiet_fit(learner([a], normal_dls()), 1, 1e-3)
    state = deepcopy(a.state_dict())
    assert {'generator', 'policy'} <= state.keys() and 'generator' not in Plain().state_dict()
    b.load_state_dict(state)
    assert torch.equal(a.generator.get_state(), b.generator.get_state()) and torch.equal(a.policy.rate, b.policy.rate)
    def draw(cb): return torch.rand(3, generator=cb.generator)
    assert torch.equal(draw(a), draw(b))
    c = Strong(lambda x, g: x)   # a plain function has nothing to remember
    assert c.state_dict()['policy'] is None
    c.load_state_dict(c.state_dict())

@pytest.mark.parametrize('trained', [False, True])
def test_lr_find_leaves_the_policy_alone(trained):
    def own(l):
        s = l.strong.state_dict()
        return s['generator'], s['policy'], s['n_step'], s['n_batch']
    made = [learner([Strong(Probing())], digits_dls()) for _ in range(2)]
    if trained: made = [quiet_fit(l, 1, 1e-2) for l in made]
    a, b = made
    at = b.dls.train.state_dict()
    with b.no_bar(): b.lr_find(num_it=7, show_plot=False)
    b.dls.train.load_state_dict(at)   # the labelled images are the loader's own business
    assert differences(own(a), own(b)) == [] and differences(weights(a), weights(b)) == []
    for l in made: quiet_fit(l, 1, 1e-2)
    assert differences((own(a), weights(a), weights(a.ema_teacher.teacher)), (own(b), weights(b), weights(b.ema_teacher.teacher))) == []

def test_own_number_of_views():
    cb = Strong(Policy())
    quiet_fit(learner([cb], digits_dls()), 1, 1e-3)
    assert cb.K == 1 and cb.rows[0][1].shape[0] == 2 == cb.stream.K and Plain(K=3).n_views == 3

def test_policy_is_not_exported(tmp_path):
    learn = quiet_fit(learner([Strong(CTAugment())], digits_dls(), path=tmp_path), 1, 1e-3)
    learn.strong.rows = []
    learn.export('a.pkl')
    assert load_learner(tmp_path/'a.pkl').strong.policy is None
