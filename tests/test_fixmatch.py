"FixMatch, FlexMatch, FreeMatch: equations for any numbers, SGD and cosine, exact resume, bad input, fastai's other features."
import math, random, signal
from copy import deepcopy
from functools import partial

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.cli import OPTIMIZERS, PRESETS, main, make_learner, method_settings
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unlabeled_dl
from ssl_notes.ctaugment import CTAugment
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.fixmatch import (FIXMATCH_OPS, FixMatchCallback, FlexMatchCallback, FreeMatchCallback, confident, cosine_7_16, fairness,
                                fixmatch_loss, fixmatch_schedule, fixmatch_sgd, flexmatch_thresholds, freematch_thresholds,
                                freematch_update, spread)
from ssl_notes.randaugment import STRONG, RandAugment

from helpers import (die, differences, DIGITS, digits_dls, Every, in_child, Items, learner, linux, loader, own_dls,
                     parameters, quiet_fit, refused, tiny_net, weights)

def plain(x, generator=None): return x
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def cta(): return CTAugment(rule='bins', cutout=1.)
def digits_dls7(**kw): return digits_dls(**{**dict(bs=4, ubs=12), **kw})
mild = STRONG['digits']
fix = partial(FixMatchCallback, strong=mild, threshold=.15, ema=.9)
flex = partial(FlexMatchCallback, strong=mild, threshold=.15, ema=.9)
free = partial(FreeMatchCallback, strong=mild, m=.5, ema=.9)
KINDS = dict(fix=fix, flex=flex, free=free)
kinds = pytest.mark.parametrize('kind', KINDS)
quick = settings(max_examples=40, deadline=None)

def rows(seed, n=8, c=5, scale=2.): return scale*torch.randn(n, c, generator=torch.Generator().manual_seed(seed))
def method(learn): return next(cb for cb in learn.cbs if isinstance(cb, FixMatchCallback))
def cols(learn, row=-1): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[row]))


# -- FixMatch's equations -------------------------------------------------------------------------
@quick
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 7), st.floats(0, 1))
def test_loss_against_a_loop(seed, n, c, threshold):
    weak, strong = rows(seed, n, c), rows(seed+1, n, c)
    q = weak.softmax(1)
    mask = confident(q, threshold)
    assert mask.tolist() == [float(max(r) >= threshold) for r in q.tolist()]
    want = sum(m*(-s.log_softmax(0)[w.argmax()]) for m,w,s in zip(mask, weak, strong))/n
    torch.testing.assert_close(fixmatch_loss(weak, strong, mask), torch.as_tensor(want))
    assert torch.equal(fixmatch_loss(weak, strong, mask), fixmatch_loss(q, strong, mask))

def test_loss_by_hand():
    t = partial(torch.tensor, dtype=torch.float64)
    weak, strong = t([[6, 0, 0], [1, 0, 0], [0, 4, 0], [0, 0, 3.7]]), t([[2, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]])
    mask = confident(weak.softmax(1))
    assert mask.tolist() == [1, 0, 1, 1]
    loss = fixmatch_loss(weak, strong, mask)
    assert math.isclose(loss, 0.705261371, abs_tol=1e-9) and math.isclose(loss*4/3, 0.940348494, abs_tol=1e-9)   # the second is the wrong one
    # A row exactly at the threshold is kept; thresholds may differ from row to row
    assert confident(t([[.95, .05], [.949, .051]])).tolist() == [1, 0]
    assert confident(t([[.6, .4], [.6, .4]]), t([.5, .7])).tolist() == [1, 0]

def test_no_row_kept():
    strong = rows(1).requires_grad_()
    loss = fixmatch_loss(rows(0), strong, torch.zeros(8))
    loss.backward()
    assert loss == 0 and not strong.grad.any()

@quick
@given(st.integers(1, 8), st.integers(1, 8))
def test_spread(groups, size):
    "Its own inverse with the numbers swapped; each slice has rows of all parts"
    x = torch.arange(groups*size)
    y = spread(x, groups)
    assert torch.equal(spread(y, size), x)
    for k,part in enumerate(y.split(size)): assert part.tolist() == list(range(k, groups*size, groups))
    images = torch.rand(groups*size, 1, 2, 2)
    assert torch.equal(spread(images, groups), images[y])

def test_spread_by_hand(): assert spread(torch.arange(6), 3).tolist() == [0, 3, 1, 4, 2, 5]

def test_operations():
    "Fourteen, no inversion, each with probability one half at ten levels, and a grey hole"
    assert len(FIXMATCH_OPS) == 14 and 'invert' not in FIXMATCH_OPS
    r = FixMatchCallback().policy
    assert isinstance(r, RandAugment) and list(r.ops) == list(FIXMATCH_OPS)


# -- SGD and cosine -------------------------------------------------------------------------------
@pytest.mark.parametrize('wd, mom', [(5e-4, .9), (.1, .5), (0., .9)])
def test_sgd_against_torch(wd, mom):
    "Nesterov momentum in a real run, with decay of kernels only, and a rate that changes"
    learn, seen = learner([fix()], opt_func=partial(fixmatch_sgd, wd=wd, mom=mom)), []
    learn.create_opt()
    twin = deepcopy(learn.model)
    bare = [p for n,p in twin.named_parameters() if n.endswith('bias') or n.startswith('1.')]   # the second module is BatchNorm
    kernels = [p for n,p in twin.named_parameters() if not any(p is o for o in bare)]
    opt = torch.optim.SGD([dict(params=kernels, weight_decay=wd), dict(params=bare, weight_decay=0.)], lr=1., momentum=mom, nesterov=True)
    def take(o):
        for p,q in zip(learn.model.parameters(), twin.parameters()): q.grad = p.grad.clone()
        for g in opt.param_groups: g['lr'] = learn.opt.hypers[0]['lr']
        opt.step()
        seen.append(learn.opt.hypers[0]['lr'])
    def compare(o):
        for p,q in zip(learn.model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    quiet_fit(learn, 3, .1, cbs=[fixmatch_schedule(.1), Every('before_step', take), Every('after_step', compare)])
    np.testing.assert_allclose(seen, [.1*math.cos(7*math.pi*k/(16*12)) for k in range(12)], rtol=1e-6)

def test_cosine():
    np.testing.assert_allclose([cosine_7_16(k) for k in (0, .25, .5, .75, 1)], [1, 0.941544065, 0.773010453, 0.514102744, 0.195090322], atol=1e-9)
    d = fixmatch_sgd([nn.Linear(2, 2).weight]).hypers[0]
    assert (d['lr'], d['wd'], d['mom']) == (.03, 5e-4, .9)

def test_command_of_sgd():
    assert OPTIMIZERS['sgd'] == (fixmatch_sgd, .03)
    kw = method_settings('fixmatch', PRESETS['digits'], 4, 2)
    learn = make_learner('fixmatch', DIGITS, labels=40, seed=0, steps=4, evals=2, bs=4, ubs=8, opt='sgd', **kw)
    learn.create_opt()
    assert 'nesterov' in str([getattr(c, '__name__', c) for c in learn.opt.cbs])


# -- FlexMatch ------------------------------------------------------------------------------------
@quick
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.floats(0, 1))
def test_flexmatch_against_a_loop(memory, tau):
    counts = [memory.count(k) for k in range(4)]
    most = max(counts + [memory.count(-1)])
    want = [tau*(n/most)/(2 - n/most) for n in counts]
    np.testing.assert_allclose(flexmatch_thresholds(torch.tensor(memory), 4, tau), want, rtol=1e-5, atol=1e-7)

def test_flexmatch_by_hand():
    def at(n, *counts): return torch.tensor([-1]*(n - sum(counts)) + [k for k,m in enumerate(counts) for _ in range(m)])
    for memory,want in ((at(100, 10, 5, 2), [0.06089744, 0.02950311, 0.01158537]), (at(100, 50, 25, 5), [.95, 0.31666667, .05]),
                        (torch.tensor([-1, -1, -1, -1, 0, 0, 0, 1, 2, 2]), [.57, 0.13571429, 0.31666667]), (at(9), [0., 0., 0.])):
        np.testing.assert_allclose(flexmatch_thresholds(memory, 3), want, rtol=1e-5, atol=1e-8)

def test_flexmatch_over_a_run():
    "Against a memory in a dict: thresholds from before the batch, entries at the fixed threshold; all is kept at first"
    cb, memory, n = flex(), {}, [0]
    keep = cb.keep
    def look(q, idx):
        counts = [list(memory.values()).count(k) for k in range(10)]
        most = max(counts + [cb.stream.n - len(memory)])
        cut = [.15*(o/most)/(2 - o/most) for o in counts]
        mask = keep(q, idx)
        for row,i,m in zip(q.tolist(), idx.tolist(), mask.tolist()):
            k = int(np.argmax(row))
            if abs(row[k] - cut[k]) > 1e-6: assert m == (row[k] >= cut[k])
        for row,i in zip(q.tolist(), idx.tolist()):
            if max(row) >= np.float32(.15): memory[i] = int(np.argmax(row))
        if not n[0]: assert mask.all()
        n[0] += 1
        got = {i: k for i,k in enumerate(cb.memory.tolist()) if k >= 0}
        assert got == memory
        return mask
    cb.keep = look
    learn = quiet_fit(learner([cb], digits_dls7(steps=20)), 2, 1e-2)
    assert n[0] == 40 and len(memory) > 20 and cb.memory.dtype == torch.int64 and len(cb.memory) == cb.stream.n
    assert not cb.memory.requires_grad


# -- FreeMatch ------------------------------------------------------------------------------------
t64 = partial(torch.tensor, dtype=torch.float64)
PROBS = t64([[.9, .05, .05], [.2, .7, .1], [.5, .3, .2], [.1, .1, .8]])
def start(c=3): return t64(1/c), t64([1/c]*c), t64([1/c]*c)

@pytest.mark.parametrize('m, want', [(.999, (0.333725, [0.333425, 0.3332875, 0.3332875], [.3335, .33325, .33325], [0.333725, 0.33358738, 0.33358738])),
                                     (.9, (.3725, [.3425, .32875, .32875], [.35, .325, .325], [.3725, 0.35754562, 0.35754562]))])
def test_freematch_by_hand(m, want):
    stats = freematch_update(start(), PROBS, m)
    for got,w in zip((*stats, freematch_thresholds(*stats[:2])), want): np.testing.assert_allclose(got, w, atol=1e-8)

def test_fairness_by_hand():
    strong = t64([[.8, .1, .1], [.3, .6, .1], [.6, .2, .2], [.2, .1, .7]]).log()
    stats = freematch_update(start(), PROBS, .9)
    assert math.isclose(fairness(stats, strong, torch.ones(4)), -1.099744797, abs_tol=1e-8)

@quick
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8), st.floats(0, 1), st.integers(1, 4))
def test_freematch_against_a_loop(seed, c, n, m, steps):
    stats = tuple(o.float() for o in start(c))
    tau, p, h = 1/c, np.full(c, 1/c), np.full(c, 1/c)
    for s in range(steps):
        q = rows(seed + s, n, c).softmax(1)
        stats, a = freematch_update(stats, q, m), q.double().numpy()
        tau, p = m*tau + (1-m)*a.max(1).mean(), m*p + (1-m)*a.mean(0)
        h = m*h + (1-m)*np.bincount(a.argmax(1), minlength=c)/n
    for got,want in zip((*stats, freematch_thresholds(*stats[:2])), (tau, p, h, tau*p/p.max())): np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    for o in stats[1:]: torch.testing.assert_close(o.sum(), torch.tensor(1.), rtol=1e-4, atol=1e-5)

@quick
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8), st.floats(.1, .95))
def test_fairness_against_a_loop(seed, c, n, m):
    "In plain loops; finite, with a finite gradient, and none comes from rows that are not kept"
    stats = freematch_update(tuple(o.float() for o in start(c)), rows(seed, n, c).softmax(1), m)
    strong, mask = rows(seed+1, n, c).requires_grad_(), (rows(seed+2, n, 1)[:, 0] > 0).float()
    loss = fairness(stats, strong, mask)
    kept = strong.detach().double()[mask > 0]
    if len(kept):
        prob = kept.softmax(1)
        count, mean = prob.argmax(1).bincount(minlength=c)/len(kept), prob.mean(0)
        b = [float(v/k) if k > 0 else 0. for v,k in zip(mean, count)]
        a = [float(v/k) for v,k in zip(*stats[1:])]
        want = sum(v/sum(a)*math.log(w/sum(b) + 1e-12) for v,w in zip(a, b))
        assert math.isclose(float(loss.detach()), want, rel_tol=1e-3, abs_tol=1e-4)
    else: assert loss == 0
    loss.backward()
    assert strong.grad.isfinite().all() and not strong.grad[mask == 0].any()

@pytest.mark.parametrize('m', [0., .5])
def test_fairness_of_a_class_that_was_never_guessed(m):
    "Its running histogram is 0, at once or after many updates: the class has no share, and nothing is infinite"
    sure = torch.eye(3)[[0, 0, 1]]*.98 + .01   # nobody guesses class 2
    stats = tuple(o.float() for o in start())
    for _ in range(300): stats = freematch_update(stats, sure/sure.sum(1, keepdim=True), m)
    assert stats[2][2] == 0
    strong = rows(3, 6, 3).requires_grad_()
    loss = fairness(stats, strong, torch.ones(6))
    loss.backward()
    assert loss.isfinite() and strong.grad.isfinite().all()

def test_freematch_with_no_memory_trains():
    learn = quiet_fit(learner([free(m=0., lambda_f=.5)], digits_dls7(steps=10)), 1, 1e-2)
    assert np.isfinite(learn.recorder.losses).all()

def test_freematch_over_a_run():
    "Means are updated before rows are kept"
    cb, seen = free(), []
    keep = cb.keep
    def look(q, idx):
        old, mask = cb.stats, keep(q, idx)
        want = freematch_update(old, q, .5)
        assert differences(list(want), list(cb.stats)) == []
        assert torch.equal(mask, confident(q, freematch_thresholds(*want[:2])[q.argmax(1)]))
        seen.append(float(cb.stats[0]))
        return mask
    cb.keep = look
    learn = quiet_fit(learner([cb], digits_dls7(steps=6)), 1, 1e-2)
    assert math.isclose(cols(learn)['tau'], np.mean(seen), rel_tol=1e-5) and len(seen) == 6 and not cb.stats[1].requires_grad


# -- one step -------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize('sizes', [(8, 8), (4, 12), (6, 14), (4, 28)], ids=str)
def test_a_step_by_hand(kind, sizes):
    "Total and columns from what went in; one forward of all rows, in an order that is undone"
    cb, seen = KINDS[kind](lambda_u=.7), []
    make, strengthen = cb.make_batch, cb.strengthen
    def look(x, y, views, idx):
        cb.weak, cb.given, cb.known = views[0], x, y
        return make(x, y, views, idx)
    def strong(x):
        cb.strong_rows = strengthen(x)
        assert len(x) == sizes[1]
        return cb.strong_rows
    cb.make_batch, cb.strengthen = look, strong
    def check(o):
        net = learn.model
        q, z = net(cb.weak).softmax(1).detach(), net(cb.strong_rows)
        terms = [F.cross_entropy(net(cb.given), cb.known.argmax(1)), (cb.mask*F.cross_entropy(z, q.argmax(1), reduction='none')).sum()/sizes[1]]
        total = terms[0] + .7*terms[1]
        if kind == 'free': total = total + .01*fairness(cb.stats, z, cb.mask)
        torch.testing.assert_close(cb.total, total)
        torch.testing.assert_close(o.learn.pred, net(cb.given))
        right = (cb.mask*(q.argmax(1) == cb.hidden_labels(cb.idx))).mean()
        seen.append([float(v.detach()) for v in (*terms, cb.mask.mean(), right)])
        ps = list(net.parameters())
        cb.grads = torch.autograd.grad(total, ps)
    def grads(o):
        for p,g in zip(learn.model.parameters(), cb.grads): torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)
    learn = learner([cb], digits_dls(sizes[0], ubs=sizes[1]), linear)
    quiet_fit(learn, 1, 1e-2, cbs=[Every('after_loss', check), Every('before_step', grads)])
    row = cols(learn)
    np.testing.assert_allclose([row[k] for k in ('loss_x', 'loss_u', 'mask_rate', 'right_rate')], np.mean(seen, 0), rtol=1e-4, atol=1e-6)
    assert len(seen) == 4

@kinds
def test_one_forward(kind):
    "All rows through BatchNorm together, in training mode: the guesses are the student's"
    calls = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()
        def forward(self, x):
            if self.training: calls.append((len(x), torch.is_grad_enabled()))
            return self.net(x)
    learn = quiet_fit(learner([KINDS[kind]()], digits_dls7(), Net), 1)
    assert calls == [(4 + 12 + 12, True)]*4 and learn.model.net[1].num_batches_tracked == 4

def test_order_of_rows_does_not_matter(monkeypatch):
    "On one device the interleave is a permutation: without it, the same step up to rounding"
    import ssl_notes.fixmatch as m
    a = quiet_fit(learner([fix()], opt_func=SGD), 1, 1e-2)
    monkeypatch.setattr(m, 'spread', lambda x, n: x)
    b = quiet_fit(learner([fix()], opt_func=SGD), 1, 1e-2)
    for (k,v),w in zip(weights(a).items(), weights(b).values()): torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('strong', [mild, cta(), RandAugment(ops=FIXMATCH_OPS), plain], ids=['ra', 'cta', 'fixmatch', 'plain'])
def test_labelled_images_stay_weak(strong):
    cb = fix(strong=deepcopy(strong))
    learn, make = learner([cb]), cb.make_batch
    def look(x, y, views, idx):
        out = spread(make(x, y, views, idx), 8)
        n = len(x)
        assert torch.equal(out[:n], x) and torch.equal(out[n:2*n], views[0])
        assert torch.equal(out[2*n:], views[1]) == (strong is plain) and not torch.equal(views[0], views[1])
        return spread(out, 3)
    cb.make_batch = look
    quiet_fit(learn, 1, 1e-2)

def test_probe():
    "With CTAugment the averaged network is asked about labelled images at each step, with RandAugment never"
    policy, asked = cta(), []
    update = policy.update
    policy.update = lambda used, omega: asked.append((used, omega)) or update(used, omega)
    quiet_fit(learner([fix(strong=policy)], digits_dls7()), 2, 1e-2)
    assert [tuple(u.shape) for u,_ in asked] == [(4, 4)]*8
    again = cta()
    for o in asked: again.update(*o)
    assert torch.equal(again.rates, policy.rates) and (again.rates < 1).any()

@kinds
def test_hidden_labels_change_nothing_but_their_column(kind):
    def go(hide):
        dls = digits_dls7()
        if hide: dls.unlabeled.dataset.y = torch.full_like(dls.unlabeled.dataset.y, -1)
        learn = quiet_fit(learner([KINDS[kind]()], dls), 2, 1e-2)
        return learn, cols(learn)
    (a, x), (b, y) = go(False), go(True)
    assert differences(weights(a), weights(b)) == []
    assert math.isnan(y['right_rate']) and 0 <= x['right_rate'] <= x['mask_rate'] == y['mask_rate']

@pytest.mark.parametrize('kind, other', [('fix', dict(seed=1)), ('fix', dict(lambda_u=0.)), ('fix', dict(threshold=0.)), ('fix', dict(threshold=1.)), ('fix', dict(strong=cta())),
    ('fix', dict(strong=None)), ('flex', dict(lambda_u=0.)), ('free', dict(m=.9)), ('free', dict(lambda_f=1.)), ('free', dict(lambda_u=0.))], ids=str)
def test_every_argument_matters(kind, other):
    ends = [parameters(quiet_fit(learner([KINDS[kind](**kw)], digits_dls(16, ubs=48, steps=6), linear), 1, 3e-2)) for kw in (dict(), other)]
    assert differences(*ends)

def test_nothing_kept_is_supervised_training():
    a, b = (quiet_fit(learner([fix(**kw)]), 1, 1e-2) for kw in (dict(threshold=1.), dict(lambda_u=0.)))
    assert differences(weights(a), weights(b)) == [] and cols(a)['mask_rate'] == cols(a)['right_rate'] == cols(a)['loss_u'] == 0

def test_defaults():
    d = FixMatchCallback()
    assert (d.threshold, d.lambda_u, d.ema, d.n_views) == (.95, 1., .999, 2)
    d = FreeMatchCallback()
    assert (d.m, d.lambda_f, d.lambda_u, d.ema) == (.999, .01, 1., .999)


# -- resume ---------------------------------------------------------------------------------------
def whole_run(kind, folder, cbs=None, n_acc=None, strong=None, model=tiny_net, sgd=False):
    cb = KINDS[kind](**({} if strong is None else dict(strong=strong())))
    more = [] if n_acc is None else [GradientAccumulation(n_acc)]
    kw = dict(opt_func=fixmatch_sgd) if sgd else {}
    learn = learner([cb, Checkpoint(folder, every=2, keep=2), *more], digits_dls7(steps=5), model, **kw)
    return quiet_fit(learn, 2, 2e-2, cbs=[*([fixmatch_schedule(2e-2)] if sgd else []), *([cbs] if cbs else [])])

RUNS = [('fix', dict(), 'after_loss', 4), ('fix', dict(sgd=True), 'after_step', 8), ('fix', dict(strong=cta), 'before_batch', 7), ('fix', dict(strong=cta, n_acc=8), 'after_loss', 6),
        ('flex', dict(), 'before_batch', 9), ('flex', dict(n_acc=8), 'after_pred', 6), ('free', dict(), 'after_step', 5), ('free', dict(n_acc=8, strong=cta), 'before_batch', 7),
        ('flex', dict(model=partial(tiny_net, dropout=.3), sgd=True), 'after_batch', 4)]

@linux
@pytest.mark.parametrize('kind, kw, event, n', RUNS)
def test_killed_and_resumed(kind, kw, event, n, tmp_path):
    expected = read_checkpoint(whole_run(kind, tmp_path/'a', **kw).checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        if not cb.training: return
        count[0] += 1
        if count[0] == n: die()
    assert in_child(lambda: whole_run(kind, tmp_path/'b', Every(event, kill), **kw)) == signal.SIGKILL
    got = read_checkpoint(whole_run(kind, tmp_path/'b', **kw).checkpoint.files()[-1])
    assert differences(expected, got) == []

@kinds
def test_what_a_checkpoint_holds(kind, tmp_path):
    learn = whole_run(kind, tmp_path, strong=cta)
    own = read_checkpoint(learn.checkpoint.files()[-1])['cbs'][method(learn).name]
    assert (own['policy']['rates'] < 1).sum() > (own['policy']['rates'] == -torch.inf).sum() and torch.equal(own['generator'], method(learn).generator.get_state())
    if kind == 'flex': assert (own['memory'] >= 0).any()
    if kind == 'free': assert own['stats'][0] != .1 and own['stats'][1].shape == own['stats'][2].shape == (10,)

@pytest.mark.parametrize('kind', ['flex', 'free', 'fix'])
def test_checkpoint_of_other_data(kind, tmp_path):
    "A memory of another length, or a damaged file: refused, with the reason"
    learn = whole_run(kind, tmp_path/'a')
    state = method(learn).state_dict()
    other = KINDS[kind](ImageDL(DIGITS.train.subset(slice(100)), 8, index=True, steps=4))
    other.load_state_dict(deepcopy(state))
    with pytest.raises(ValueError, match='unlabeled: the checkpoint was written with.*now there are 100'): quiet_fit(learner([other]), 1)
    made = quiet_fit(learner([KINDS[kind](ImageDL(DIGITS.train.subset(slice(100)), 8, index=True, steps=4))]), 1)
    with pytest.raises(ValueError, match='now there are 100'): method(made).load_state_dict(deepcopy(state))
    if kind == 'flex': assert len(method(made).memory) == 100
    f = learn.checkpoint.files()[-1]
    f.write_bytes(f.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a whole checkpoint'): whole_run(kind, tmp_path/'a')

def test_checkpoint_of_another_method(tmp_path):
    whole_run('fix', tmp_path)
    with pytest.raises(ValueError, match='callbacks='): whole_run('flex', tmp_path)


# -- with the rest of fastai ----------------------------------------------------------------------
@pytest.mark.parametrize('strong', [None, cta])
@pytest.mark.parametrize('trained', [False, True])
@kinds
def test_lr_find_changes_nothing(kind, trained, strong, recwarn):
    "And a fit after it is the fit that would have been"
    a, b = (learner([KINDS[kind](**(dict(strong=strong()) if strong else {}))], digits_dls7(), opt_func=fixmatch_sgd) for _ in range(2))
    if trained:
        for l in (a, b): quiet_fit(l, 1, 1e-2)
    at = b.dls.train.state_dict()
    with b.no_bar(): b.lr_find(num_it=6, show_plot=False)
    assert not [w for w in recwarn if 'optimizer state' in str(w.message)]
    b.dls.train.load_state_dict(at)   # the labelled images are the loader's own business
    if not trained: assert getattr(method(b), 'memory', None) is None and getattr(method(b), 'stats', None) is None
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    own = lambda l: (weights(l), method(l).state_dict(), l.ema_teacher.state_dict(), l.opt.state_dict())
    assert differences(own(a), own(b)) == []

@kinds
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
def test_no_trace_after_cancel(kind, event):
    learn = learner([], digits_dls7())
    learn.create_opt()
    model, n, held = learn.model, len(learn.cbs), [id(p) for p,*_ in learn.opt.all_params()]
    def stop(o):
        if o.train_iter >= 2: raise CancelFitException
    cb = KINDS[kind]()
    quiet_fit(learn, 1, 1e-2, cbs=[cb, Every(event, stop, valid=True)])
    assert len(learn.cbs) == n and not hasattr(learn, 'ema_teacher') and learn.model is model
    assert not [k for k in cb.of_batch if k in vars(cb)] and [id(p) for p,*_ in learn.opt.all_params()] == held
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    quiet_fit(learn, 1, 1e-2)
    assert 'mask_rate' not in learn.recorder.metric_names
    step = cb.n_step
    quiet_fit(learn, 1, 1e-2, cbs=cb)
    assert cb.n_step == step + 4

@kinds
def test_second_fit_goes_on(kind):
    learn = quiet_fit(learner([cb := KINDS[kind]()], digits_dls7()), 1, 1e-2)
    was, seen = deepcopy(cb.state_dict()), []
    quiet_fit(learn, 1, 1e-2, cbs=Every('before_train', lambda o: seen.append(deepcopy(cb.state_dict()))))
    assert differences(was, seen[0], skip=('sums',)) == [] and cb.n_step == 8

@kinds
def test_export(kind, tmp_path):
    learn = quiet_fit(learner([KINDS[kind](strong=cta())], path=tmp_path), 1, 1e-2)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    assert method(again).policy is None and method(again).stream is None
    x = DIGITS.test.subset(slice(20))
    with learn.no_bar(), again.no_bar(): was, now = (l.get_preds(dl=ImageDL(x, 10))[0] for l in (learn, again))
    assert torch.equal(was, now)

@kinds
def test_gradient_accumulation(kind):
    learn = quiet_fit(learner([KINDS[kind](), GradientAccumulation(8)], digits_dls7()), 2)
    assert method(learn).n_step == 4 == learn.ema_teacher.n_updates and method(learn).n_batch == 8

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@kinds
def test_mixed_precision(kind):
    "The forwards in bf16, also of the probe; confidences, means and losses in fp32"
    seen, inside = [], []
    learn = learner([cb := KINDS[kind](strong=cta()), MixedPrecision(AMPMode.BF16)], digits_dls7(), opt_func=partial(SGD, mom=.9))
    h = learn.model[-1].register_forward_hook(lambda m, i, o: inside.append((len(o), o.dtype)) if m.training else None)
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_pred', lambda o: seen.extend([cb.total.dtype, o.pred.dtype, cb.mask.dtype, *(s.dtype for s in getattr(cb, 'stats', None) or ())])))
    h.remove()
    assert set(seen) == {torch.float32} and set(inside) == {(28, torch.bfloat16)}
    assert not torch.is_autocast_enabled('cpu') and np.isfinite(learn.recorder.losses).all()

def test_own_teacher_and_none():
    assert quiet_fit(learner([EMATeacher(.5), fix()]), 1).ema_teacher.decay == .5
    assert not hasattr(quiet_fit(learner([fix(ema=None)]), 1), 'ema_teacher')

def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

@pytest.mark.parametrize('make, strong', [(FixMatchCallback, None), (FlexMatchCallback, cta), (FreeMatchCallback, None)])
def test_ordinary_datablock(make, strong):
    "A `DataBlock`, `unlabeled_dl` and a `vision_learner` with `Normalize`: the policy sees pictures, the network what it always does"
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(20, 30)), item_tfms=Resize(32), batch_tfms=[*aug_transforms(size=32), Normalize.from_stats(*imagenet_stats, cuda=False)])
    dls = block.dataloaders(list(range(30)), bs=8, num_workers=0, device='cpu')
    unl = unlabeled_dl(dls, list(range(100, 160)), bs=16, num_workers=0)
    cb = make(unl, strong=None if strong is None else strong(), ema=.9)
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=cb)
    seen, real = [], cb.policy
    class Look:
        def __call__(self, x, generator):
            seen.append((x.dtype, tuple(x.shape), float(x.min()) > -1e-3, float(x.max()) < 1.001))
            return real(x, generator)
        def __getattr__(self, k): return getattr(real, k)
    cb.policy = Look()
    quiet_fit(learn, 1, 1e-3)
    assert set(seen) == {(torch.float32, (16, 3, 32, 32), True, True)} and len(seen) == 2 == cb.n_step
    assert math.isnan(cols(learn)['right_rate']) and learn.recorder.metric_names[3:-1] == [*make.terms]
    assert np.isfinite([v for k,v in cols(learn).items() if k != 'right_rate']).all()


# -- bad input ------------------------------------------------------------------------------------
nan, inf = float('nan'), float('inf')
both = [dict(lambda_u=-1), dict(lambda_u=nan), dict(lambda_u=inf), dict(ema=1.5), dict(ema=nan)]
ARGS = [(c, kw) for c in (FixMatchCallback, FlexMatchCallback) for kw in [dict(threshold=-.1), dict(threshold=1.1), dict(threshold=nan), *both]]
ARGS += [(FreeMatchCallback, kw) for kw in [dict(m=-.1), dict(m=1.1), dict(m=nan), dict(lambda_f=-1), dict(lambda_f=nan), dict(lambda_f=inf), *both]]

@pytest.mark.parametrize('make, kw', ARGS, ids=str)
def test_arguments(make, kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError) as e: make(**kw)
    assert str(e.value).startswith(f'{name}: got') and repr(value) in str(e.value) and 'expected' in str(e.value)

def test_freematch_has_no_threshold():
    "It would be ignored: it is refused"
    with pytest.raises((TypeError, ValueError), match='threshold'): FreeMatchCallback(threshold=.5)

@pytest.mark.parametrize('make', [FixMatchCallback, FlexMatchCallback, FreeMatchCallback])
@pytest.mark.parametrize('strong', ['cifar', 3, [mild]], ids=str)
def test_strong_is_no_function(strong, make):
    with pytest.raises(TypeError, match='strong: got'): make(strong=strong)

@kinds
def test_probing_without_a_teacher(kind): refused(learner([KINDS[kind](strong=cta(), ema=None)]), 'ema: this policy asks the averaged network')

@kinds
def test_loaders(kind):
    make = KINDS[kind]
    refused(learner([make(ImageDL(DIGITS.train.subset(slice(5)), 8, index=True))]), 'unlabeled: 5 images do not fill one batch of 8')
    refused(learner([make()], mixed_dls(DIGITS, 40, bs=16, steps=4, valid=40, device='cpu')), 'dls.train: it mixes known and unknown labels')
    refused(learner([make(loader(Items(shape=(1, 12, 12))))], own_dls()), 'unlabeled: its images are (1, 12, 12)')
    refused(learner([make()], own_dls(bs=1)), 'dls.train: a batch of one labelled image')
    refused(learner([make()], own_dls(shape=(5, 8, 8)), partial(tiny_net, channels=5)), 'images of 5 channels')
    dls = own_dls()
    dls.unlabeled = None
    refused(learner([make()], dls), f'unlabeled: {make.func.__name__} has no unlabelled data')
    quiet_fit(learner([make()], own_dls(shape=(1, 8, 12))), 1)   # images need not be square

@kinds
def test_bad_images_and_labels(kind):
    for where in ('labelled', 'unlabelled'):
        dls = own_dls()
        (dls.train if where == 'labelled' else dls.unlabeled).dataset.x[:, 0, 3, 3] = nan
        refused(learner([KINDS[kind]()], dls), f'step 0: the {where} images are not finite', error=FloatingPointError)
    dls = own_dls()
    dls.unlabeled.dataset.x.mul_(255)
    refused(learner([KINDS[kind]()], dls), 'strong: the images leave [0,1]')
    items = Items()
    items.y = items.y + 5
    refused(learner([KINDS[kind]()], own_dls(items)), 'step 0', 'label lies outside the 10 classes')
    dls = own_dls()
    del dls.c
    refused(learner([KINDS[kind]()], dls), 'dls: it does not say its number of classes')

@pytest.mark.parametrize('c', [1, 9, 11])
@kinds
def test_wrong_number_of_outputs(kind, c): refused(learner([KINDS[kind]()], model=partial(tiny_net, c)), 'model: it gives an output of shape', 'must have 10 outputs')

@kinds
def test_bad_loss(kind):
    def spoil(o):
        if cb.n_step == 2:
            with torch.no_grad(): learn.model[-1].bias.fill_(nan)
    learn = learner([cb := KINDS[kind]()])
    with pytest.raises(FloatingPointError, match='step 2: the loss term loss_x is not finite'): quiet_fit(learn, 1, cbs=Every('before_batch', spoil))
    assert cb.n_step == 2

@pytest.mark.parametrize('command', ['fixmatch', 'flexmatch', 'freematch'])
@pytest.mark.parametrize('words, code', [(['--opt', 'sgd'], 0), (['--opt', 'rmsprop'], "opt: got 'rmsprop', expected one of adam, sgd"), (['--lr', '0'], 'lr: got 0')], ids=str)
def test_command_line(command, words, code, tmp_path, capsys):
    small = ['--steps', '4', '--evals', '2', '--bs', '4', '--ubs', '8', '--out', str(tmp_path)]
    got = main(['train', command, *small, *words])
    err = capsys.readouterr().err
    if not code: assert got == 0 and (tmp_path/'result.json').exists()
    else: assert got == 1 and code in err and 'Traceback' not in err and not list(tmp_path.rglob('*.pt'))
