"ReMixMatch: equations for any numbers, the rotation head and the optimiser, exact resume, bad input, fastai's other features."
import math, random, signal
from collections import deque
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
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import params
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.cli import PRESETS, main, method_settings
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unlabeled_dl
from ssl_notes.ctaugment import CTAugment
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.mixmatch import interleave, loss_x, sharpen
from ssl_notes.remixmatch import (RECIPES, ReMixMatchCallback, align, check_prior, feature_layer, features, loss_weights,
                                  normalized, remember, rotate_quarters)

from helpers import (short, die, differences, DIGITS, digits_dls, Every, in_child, Items, learner, linux, loader, own_dls,
                     parameters, quiet_fit, refused, tiny_net, weights)

remix = partial(ReMixMatchCallback, K=2, rampup=3, ema=.9)
def plain(x, generator=None): return x
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
quick = settings(max_examples=40, deadline=None)

def rows(seed, n=8, c=5, scale=2.): return scale*torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


# -- distribution alignment -----------------------------------------------------------------------
@quick
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12))
def test_align_against_a_loop(seed, n, c):
    q, data, model = rows(seed, n, c).softmax(1), *rows(seed+1, 2, c).softmax(1)
    got = align(q, data, model)
    for row,a in zip(q.tolist(), got):
        w = [o*(1e-6 + d)/(1e-6 + m) for o,d,m in zip(row, data.tolist(), model.tolist())]
        torch.testing.assert_close(a, torch.tensor([o/sum(w) for o in w]))
    torch.testing.assert_close(align(q, data, data), q)
    perm = torch.randperm(c)
    torch.testing.assert_close(align(q[:, perm], data[perm], model[perm]), got[:, perm])

def test_align_by_hand():
    third = torch.full((3,), 1/3, dtype=torch.float64)
    q, m = torch.tensor([[.6, .3, .1], [.5, .4, .1]], dtype=torch.float64), torch.tensor([.5, .3, .2], dtype=torch.float64)
    a = align(q[:1], third, m)
    np.testing.assert_allclose(a[0], [0.44444491, 0.37037027, 0.18518482], rtol=1e-6)
    np.testing.assert_allclose(sharpen(a)[0], [0.53531681, 0.3717468, 0.09293639], rtol=1e-6)
    d = torch.tensor([.2, .3, .5], dtype=torch.float64)
    a = align(q[1:], d, m)
    np.testing.assert_allclose(a[0], [0.23529487, 0.47058832, 0.29411682], rtol=1e-6)
    np.testing.assert_allclose(sharpen(a)[0], [0.15238195, 0.60952412, 0.23809393], rtol=1e-6)
    np.testing.assert_allclose(align(q[1:], d, m, 0.)[0], [4/17, 8/17, 5/17])
    np.testing.assert_allclose(align(sharpen(q[1:]), d, m)[0], [0.35087719, 0.56140351, 0.0877193], rtol=1e-5)   # the wrong order

def test_align_of_a_class_never_predicted():
    a = align(torch.tensor([[1., 0.], [.5, .5]]), torch.tensor([.5, .5]), torch.tensor([1., 0.]))
    assert a.isfinite().all() and a[0].tolist() == [1., 0.] and a[1, 1] > .999

@quick
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 20))
def test_remember_against_a_deque(seed, size, n):
    fifo, q = torch.full((size, 3), 1/3), deque([torch.full((3,), 1/3)]*size, maxlen=size)
    for mean in rows(seed, n, 3).softmax(1):
        fifo = remember(fifo, mean)
        q.append(mean)
    assert torch.equal(fifo, torch.stack(list(q)))

def test_remember_by_hand():
    fifo, mean = torch.full((128, 3), 1/3, dtype=torch.float64), torch.tensor([.7, .2, .1], dtype=torch.float64)
    want = {1: [0.33619792, 0.33229167, 0.33151042], 2: [.3390625, .33125, .3296875], 64: [.51666667, .26666667, .21666667], 128: [.7, .2, .1]}
    for n in range(1, 201):
        fifo = remember(fifo, mean)
        if n in want: np.testing.assert_allclose(normalized(fifo.mean(0)), want[n], atol=1e-8)
    np.testing.assert_allclose(fifo.mean(0), mean)

@pytest.mark.parametrize('prior', [None, [.19] + [.09]*9])
@pytest.mark.parametrize('T', [.5, 1.])
def test_guess_over_many_steps(prior, T):
    "Against a loop in double precision: what is read was there before the batch; raw predictions and labels are remembered"
    learn = quiet_fit(learner([cb := remix(prior=prior, T=T, lambda_r=0., strong=plain)], model=linear), 1, 1e-2)
    fifo, data = [np.full(10, .1)]*128, np.full(10, .1)
    cb.fifo, cb.p_data = torch.full((128, 10), .1), torch.full((10,), .1)
    for s in range(140):
        g = torch.Generator().manual_seed(s)
        x, y = torch.rand(6, 1, 8, 8, generator=g), F.one_hot(torch.arange(6) % 3, 10).float()
        with torch.no_grad(): p = learn.model(x).softmax(1).double().numpy()
        model, want = np.mean(fifo, 0), np.array(prior or data)
        w = p*(1e-6 + want)/(1e-6 + model/model.sum())
        w = (w/w.sum(1, keepdims=True))**(1/T)
        np.testing.assert_allclose(cb.guess(x, y), w/w.sum(1, keepdims=True), rtol=2e-4, atol=1e-6)
        fifo, data = fifo[1:] + [p.mean(0)], .999*data + .001*y.double().numpy().mean(0)
    np.testing.assert_allclose(cb.fifo, fifo, rtol=1e-4)
    np.testing.assert_allclose(cb.p_data, data, rtol=1e-4)
    assert not cb.fifo.requires_grad and not cb.p_data.requires_grad

def test_p_data_by_hand():
    cb, learn = remix(lambda_r=0., strong=plain), None
    quiet_fit(learner([cb], model=linear), 1)
    cb.p_data, y = torch.full((10,), .1), torch.zeros(4, 10)
    y[:2, 0], y[2, 1], y[3, 2] = 1., 1., 1.
    for n in range(1, 101):
        cb.guess(torch.rand(4, 1, 8, 8), y)
        if n in (1, 10, 100): np.testing.assert_allclose(cb.p_data[:2], [v + (.1 - v)*.999**n for v in (.5, .25)], rtol=1e-4)
    torch.testing.assert_close(cb.p_data.sum(), torch.tensor(1.))

@pytest.mark.parametrize('prior, words', [([.5, .4], 'sum 0.9'), ([1., 0.], 'above 0'), ([1.5, -.5], 'above 0'), ([float('nan'), 1.], 'nan'),
    ([[.5, .5]], 'prior: got'), (1., 'prior: got'), ([], 'prior: got'), ([float('inf'), 1.], 'prior: got')], ids=str)
def test_bad_prior(prior, words):
    for f in (check_prior, lambda p: ReMixMatchCallback(prior=p)):
        with pytest.raises(ValueError, match='prior: got') as e: f(prior)
        assert words in str(e.value) and 'sum 1' in str(e.value)

def test_prior_of_another_length():
    refused(learner([remix(prior=torch.full((9,), 1/9))]), 'prior: it has 9 entries for 10 classes')


# -- rotation -------------------------------------------------------------------------------------
@quick
@given(st.integers(1, 23), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_rotation_against_numpy(n, c, size, seed):
    "In order, four parts whose sizes differ by one at most; also when the batch is no multiple of four"
    x = torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed))
    out, turn = rotate_quarters(x)
    k = {0: 0, 1: 2, 2: 1, 3: 3}   # quarter turns anticlockwise
    assert out.shape == x.shape and turn.dtype == torch.int64 and turn.tolist() == sorted(turn.tolist())
    for a,b,t in zip(x, out, turn.tolist()): np.testing.assert_array_equal(np.rot90(a, k[t], (1, 2)), b)
    if n >= 4:
        counts = turn.bincount(minlength=4)
        assert counts.max() - counts.min() <= 1 and (n % 4 or (counts == n//4).all())

def test_rotation_by_hand():
    out, turn = rotate_quarters(torch.tensor([[1., 2], [3, 4]]).expand(4, 1, 2, 2))
    assert turn.tolist() == [0, 1, 2, 3]
    assert out[:, 0].tolist() == [[[1, 2], [3, 4]], [[4, 3], [2, 1]], [[2, 4], [1, 3]], [[3, 1], [4, 2]]]

def test_features():
    net, x = tiny_net(), torch.rand(5, 1, 8, 8)
    layer = feature_layer(net, 10)
    assert layer is net[-1] and torch.equal(features(net.eval(), layer, x), net[:-1](x)) and not layer._forward_pre_hooks
    def bad(x): raise KeyError
    net.forward = bad
    with pytest.raises(KeyError): features(net, layer, x)
    assert not layer._forward_pre_hooks
    two = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 10), nn.Linear(10, 4))
    assert feature_layer(two, 10) is two[1]
    with pytest.raises(ValueError, match='model: it has no dense layer with 7 outputs.*lambda_r=0'): feature_layer(two, 7)


# -- loss -----------------------------------------------------------------------------------------
@quick
@given(st.integers(0, 40000), st.integers(0, 20000), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_weights(step, rampup, u, u1, r):
    w, ramp = loss_weights(step, u, u1, r, rampup), 1. if not rampup else min(1., step/rampup)
    assert w == dict(loss_x=1., loss_u=ramp*u, loss_u1=ramp*u1, loss_r=r)

def test_total_by_hand():
    t = partial(torch.tensor, dtype=torch.float64)
    x, p = t([[1., 0, -1], [0, 2, 0]]), t([[.9, .1, 0], [.2, .5, .3]])
    u, q = t([[1., 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]), t([[.8, .1, .1], [.1, .8, .1], [.3, .3, .4], [.5, .25, .25]])
    terms = dict(loss_x=loss_x(x, p), loss_u=loss_x(u, q), loss_u1=t(1.2), loss_r=F.cross_entropy(torch.zeros(4, 4), torch.arange(4)))
    assert math.isclose(terms['loss_u'], 0.941582236, abs_tol=1e-9)
    for step,want in ((0, 1.566722546), (8192, 2.572909223), (16384, 3.579095901), (99999, 3.579095901)):
        w = loss_weights(step)
        assert math.isclose(sum(w[k]*float(v) for k,v in terms.items()), want, abs_tol=1e-6)

def keep_pool(cb):
    "Remember what goes into MixUp and what comes out."
    mix = type(cb).mix.__get__(cb)
    def look(rows, targets):
        cb.pool, cb.pool_targets = rows, targets
        cb.mixed_rows = mix(rows, targets)
        return cb.mixed_rows
    cb.mix = look
    return cb

@pytest.mark.parametrize('kw', [dict(), dict(batchnorm='joint'), dict(alpha=None), dict(K=1), dict(K=8), dict(lambda_r=0.), dict(lambda_u1=0.), dict(T=1.)], ids=str)
def test_a_step_by_hand(kw):
    "Total and each column from what went into the step, for a network without BatchNorm; then the gradient, also of the head"
    cb, seen = keep_pool(remix(**kw)), []
    def look(o):
        net, n, s = cb.learn.model, cb.n_x, cb.n_step
        ce = lambda z, p: -(p*z.log_softmax(1)).sum(1).mean()
        z, ramp = net(cb.mixed_rows), min(1, s/3)
        turned, turn = rotate_quarters(cb.strong_1)
        terms = [ce(z[:n], cb.targets[:n]), ce(z[n:], cb.targets[n:]), ce(net(cb.strong_1), cb.q)]
        total = terms[0] + 1.5*ramp*terms[1] + kw.get('lambda_u1', .5)*ramp*terms[2]
        ps = list(net.parameters())
        if cb.lambda_r:
            total = total + .5*F.cross_entropy(cb.head(turned.flatten(1)), turn)
            ps += list(cb.head.parameters())
        torch.testing.assert_close(cb.total, total)
        seen.append((ps, torch.autograd.grad(total, ps), [float(t.detach()) for t in terms]))
    def check(o):
        for p,g in zip(*seen[-1][:2]): torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)
    learn = learner([cb], model=linear)
    quiet_fit(learn, 1, 1e-2, cbs=[Every('after_loss', look), Every('before_step', check)])
    assert len(seen) == 4
    row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    np.testing.assert_allclose([row[k] for k in ('loss_x', 'loss_u', 'loss_u1')], np.mean([s[2] for s in seen], 0), rtol=1e-4)
    assert math.isclose(row['ramp'], (0 + 1/3 + 2/3 + 1)/4, rel_tol=1e-6) and (row['loss_r'] == 0) == (not cb.lambda_r)

@pytest.mark.parametrize('K', [1, 3])
def test_the_pool(K):
    "Labelled images strong, the first view weak, K strong ones; one target for all; nothing has a gradient"
    marks = []
    def mark(x, generator):
        marks.append(len(x))
        return torch.ones_like(x)
    cb = keep_pool(remix(K=K, strong=mark, alpha=None))
    def look(o):
        n = cb.n_x
        assert (cb.pool[:n] == 1).all() and not (cb.pool[n:2*n] == 1).all() and (cb.pool[2*n:] == 1).all() and len(cb.pool) == n*(K + 2)
        assert torch.equal(cb.strong_1, cb.pool[2*n:3*n])
        assert torch.equal(cb.targets[:n].sum(1), torch.ones(n)) and set(cb.targets[:n].unique().tolist()) == {0., 1.}
        for t in cb.targets[n:].split(n): assert torch.equal(t, cb.q)
        assert not cb.q.requires_grad and not cb.targets.requires_grad and not cb.strong_1.requires_grad
    quiet_fit(learner([cb]), 1, cbs=Every('after_pred', look))
    assert marks == [8*(K + 1)]*4 and cb.stream.K == K + 1

@pytest.mark.parametrize('way', ['interleave', 'joint'])
def test_running_statistics(way):
    "From the *last* interleaved batch, or from the joint one; from no other forward"
    seen = []
    class Eye(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.flat, self.out = nn.BatchNorm2d(1, momentum=1.), nn.Flatten(), nn.Linear(64, 10)
        def forward(self, x):
            if self.training: seen.append((len(x), self.bn.track_running_stats, torch.is_grad_enabled()))
            return self.out(self.flat(self.bn(x)))
    cb = keep_pool(remix(batchnorm=way))
    def look(o):
        x = interleave(list(cb.mixed_rows.split(8)))[-1] if way == 'interleave' else torch.cat([cb.mixed_rows, cb.strong_1])
        torch.testing.assert_close(cb.learn.model.bn.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(cb.learn.model.bn.running_var, x.var((0, 2, 3)))
    quiet_fit(learner([cb], model=Eye), 1, 1e-2, cbs=Every('after_loss', look))
    first = (32, True, True) if way == 'interleave' else None
    step = [(8, False, False), (8, True, True)] + [(8, False, True)]*5 if way == 'interleave' else [(8, False, False), (40, True, True), (8, False, True)]
    assert seen == step*4   # guess, first forward, (turned, others, strong view)

def test_who_probes():
    "CTAugment's rates move by the averaged network's answers about labelled images, drawn before the strong ones"
    policy = CTAugment()
    asked = []
    update = policy.update
    policy.update = lambda used, omega: asked.append((used, omega)) or update(used, omega)
    learn = quiet_fit(learner([remix(strong=policy)]), 2, 1e-2)
    assert [tuple(u.shape) for u,_ in asked] == [(8, 4)]*8 and not torch.equal(policy.rates, CTAugment().rates)
    again = CTAugment()
    for u,o in asked: again.update(u, o)
    assert torch.equal(again.rates, policy.rates)

def test_hidden_labels_change_nothing_but_their_column():
    def go(hide):
        dls = digits_dls()
        if hide: dls.unlabeled.dataset.y = torch.full_like(dls.unlabeled.dataset.y, -1)
        learn = quiet_fit(learner([remix()], dls=dls), 2, 1e-2)
        return learn, dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    (a, cols), (b, without) = go(False), go(True)
    assert differences(weights(a), weights(b)) == []
    assert math.isnan(without['right_rate']) and 0 < cols['right_rate'] < 1

@pytest.mark.parametrize('other', [dict(seed=1), dict(T=1.), dict(lambda_u=0.), dict(lambda_u1=0.), dict(lambda_r=0.), dict(lambda_r=2.), dict(prior=[.19] + [.09]*9),
    dict(strong=plain), dict(strong=CTAugment(rule='bins')), dict(alpha=None), dict(K=1), dict(batchnorm='joint')], ids=short)
def test_every_argument_matters(other):
    ends = [parameters(quiet_fit(learner([remix(**kw)]), 1, 1e-2)) for kw in (dict(), other)]
    assert differences(*ends)

def test_recipes():
    assert RECIPES['cifar10_40'] == dict(K=1, lambda_r=2., rampup=131_072) and RECIPES['svhn_40']['lambda_r'] == 3. and RECIPES['stl10'] == dict(K=4)
    for kw in RECIPES.values(): ReMixMatchCallback(**kw)
    d = ReMixMatchCallback()
    assert (d.K, d.T, d.alpha, d.lambda_u, d.lambda_u1, d.lambda_r, d.rampup, d.ema, d.batchnorm) == (8, .5, .75, 1.5, .5, .5, 16384, .999, 'interleave')
    own = method_settings('remixmatch', PRESETS['cifar10'], 2**20, 1024, 40)
    assert own['K'] == 1 and own['lambda_r'] == 2. and own['rampup'] == 131_072
    assert method_settings('remixmatch', PRESETS['cifar10'], 2**20, 1024, 250)['rampup'] == 16384


# -- the rotation head and the optimiser ----------------------------------------------------------
OPTS = dict(mixmatch_adam={}, adamw=dict(opt_func=adamw))
opts = pytest.mark.parametrize('opt', OPTS)

def held(learn): return [[id(p) for p in ps] for ps in learn.opt.param_lists]
def moments(learn, cb):
    "What the optimiser remembers about the head; within a fit."
    o = learn.opt.opt.state if isinstance(learn.opt, OptimWrapper) else learn.opt.state
    return [{k: v.clone() if isinstance(v, torch.Tensor) else v for k,v in o[p].items()} for p in cb.head.parameters()]

@opts
def test_head_is_trained_and_leaves(opt):
    cb, inside = remix(), []
    learn = learner([cb], **OPTS[opt])
    learn.create_opt()
    before, names = held(learn), list(weights(learn))
    def look(o): inside.append((held(learn), cb.head.weight.detach().clone(), cb.head.bias.detach().clone()))
    ends = []
    quiet_fit(learn, 1, 1e-2, cbs=[Every('after_step', look), Every('after_train', lambda o: ends.append(moments(learn, cb)))])
    assert inside[0][0] == [before[0] + [id(p) for p in cb.head.parameters()]]
    for i in (1, 2):
        got = [o[i] for o in inside]
        assert all(not torch.equal(a, b) for a,b in zip(got, got[1:])), 'the head stands still'
    assert held(learn) == before and list(weights(learn)) == names and names == list(tiny_net().state_dict())
    assert not [m for m in learn.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert cb.head.weight.shape == (4, 8)
    # A second fit goes on with the same head and its moments
    head, was = cb.head, ends[0]
    assert any(isinstance(v, torch.Tensor) and v.any() for v in was[0].values())
    start = []
    quiet_fit(learn, 1, 1e-2, cbs=Every('before_train', lambda o: start.append((cb.head.weight.detach().clone(), moments(learn, cb)))))
    assert cb.head is head and torch.equal(start[0][0], inside[-1][1]) and differences(was, start[0][1]) == [] and held(learn) == before

@opts
@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_step', 'after_train', 'before_validate'])
def test_no_trace_after_cancel(opt, event):
    cb = remix()
    learn = learner([cb], **OPTS[opt])
    learn.create_opt()
    before, model = held(learn), learn.model
    def stop(o): raise CancelFitException
    quiet_fit(learn, 1, 1e-2, cbs=Every(event, stop, valid=True))
    assert held(learn) == before and learn.model is model
    assert not [k for k in cb.of_batch if k in vars(cb)]
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks] and model[1].track_running_stats
    quiet_fit(learn, 1, 1e-2)
    quiet_fit(learn, 1, 1e-2, cbs=Every('before_train', lambda o: before.append(held(learn)[0])))
    assert len(before[-1]) == len(before[0]) + 2, 'the head is there twice'

@opts
def test_no_trace_once_it_is_gone(opt):
    "Given to `fit` alone: the Learner knows nothing of it afterwards, and trains on"
    learn = learner(**OPTS[opt])
    learn.create_opt()
    before, n = held(learn), len(learn.cbs)
    quiet_fit(learn, 1, 1e-2, cbs=remix())
    assert held(learn) == before and len(learn.cbs) == n and not hasattr(learn, 'ema_teacher')
    quiet_fit(learn, 1, 1e-2)
    assert not {'loss_r', 'loss_x'} & set(learn.recorder.metric_names)

@opts
@pytest.mark.parametrize('event', ['before_train', 'after_loss'])
def test_interrupted(opt, event):
    "fastai sends no `after_fit` then; the callback may stay or go, the optimiser ends without the head"
    def stop(o): raise KeyboardInterrupt
    learn = learner([cb := remix()], **OPTS[opt])
    learn.create_opt()
    before = held(learn)
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1, 1e-2, cbs=Every(event, stop))
    quiet_fit(learn, 1, 1e-2)
    assert held(learn) == before
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1, 1e-2, cbs=Every(event, stop))
    learn.remove_cb(cb)
    assert held(learn) == before, 'the head stays in the optimiser'

@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_decay_of_the_head(wd_bn_bias):
    "With next to no gradient, the kernel shrinks by decay alone, and the bias only if biases do"
    cb, seen = remix(lambda_r=1e-30), []
    learn = learner([cb], opt_func=SGD, wd_bn_bias=wd_bn_bias)
    def ones(o):
        with torch.no_grad(): cb.head.weight.fill_(1.), cb.head.bias.fill_(1.)
    quiet_fit(learn, 1, .1, wd=.5, cbs=Every('before_train', ones))
    torch.testing.assert_close(cb.head.weight, torch.full((4, 8), .95**4))
    torch.testing.assert_close(cb.head.bias, torch.full((4,), .95**4 if wd_bn_bias else 1.))

@pytest.mark.parametrize('event', ['after_train', 'after_epoch'])
def test_looking_in_the_middle_of_a_run(event, tmp_path):
    "`validate` and `get_preds` send `before_fit` and `after_fit`, too: the head stays where it is"
    def look(o):
        if o.epoch or calls: return   # this sends `after_epoch`, too
        calls.append(1)
        with o.learn.no_bar(), o.learn.no_logging(): learn.get_preds(dl=learn.dls.valid)
    inside, calls = [], []
    plain_run = quiet_fit(learner([a := remix()]), 2, 1e-2)
    learn = learner([b := remix(), Checkpoint(tmp_path, every=3)])
    def late(o):
        if o.training: inside.append(len(learn.opt.all_params()))
    quiet_fit(learn, 2, 1e-2, cbs=[Every(event, look, valid=event == 'after_epoch'), Every('before_step', late)])
    assert inside == [len(list(learn.model.parameters())) + 2]*8
    assert differences((weights(plain_run), a.state_dict()), (weights(learn), b.state_dict()), skip=('sums',)) == []

@opts
def test_looking_between_two_fits(opt):
    "Also in a Learner whose optimiser was loaded"
    a, b = (learner([remix()], **OPTS[opt]) for _ in range(2))
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    with b.no_bar(), b.no_logging(): b.validate(), b.get_preds()
    b.opt.load_state_dict(deepcopy(b.opt.state_dict()))
    with b.no_bar(), b.no_logging(): b.validate()
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    assert differences((weights(a), a.re_mix_match.state_dict()), (weights(b), b.re_mix_match.state_dict())) == []

def by_halves(model): return [params(model[:2]), params(model[2:])]

@opts
@pytest.mark.parametrize('frozen', [False, True])
def test_several_groups(opt, frozen):
    "The head goes with the last group: its rate, and it moves while the first group is frozen"
    cb, seen = remix(), []
    learn = learner([cb], splitter=by_halves, **OPTS[opt])
    learn.create_opt()
    if frozen: learn.freeze()
    before, start, n = held(learn), weights(learn), learn.opt.frozen_idx
    quiet_fit(learn, 1, slice(1e-4, 1e-2), cbs=Every('after_step', lambda o: seen.append((held(learn), cb.head.weight.detach().clone(), learn.opt.hypers))))
    own = [id(p) for p in cb.head.parameters()]
    assert seen[0][0] == [before[0], before[1] + own] and held(learn) == before and learn.opt.frozen_idx == n
    assert not torch.equal(seen[0][1], seen[-1][1]) and len(seen[0][2]) == 2 and seen[0][2][1]['lr'] == 1e-2
    moved = {k for k,v in weights(learn).items() if not torch.equal(v, start[k])}
    assert ('0.weight' in moved) == (not frozen) and '6.weight' in moved
    learn.unfreeze()
    quiet_fit(learn, 1, 1e-2)
    assert held(learn) == before

def test_head_draws_by_seed():
    heads = []
    for seed in (0, 0, 1):
        cb = remix(seed=seed)
        def look(o): heads.append(cb.head.weight.detach().clone())
        torch.manual_seed(len(heads))   # no other generator counts
        quiet_fit(learner([cb], seed=len(heads)), 1, cbs=Every('before_train', look))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert abs(float(heads[0].std()) - (2/12)**.5) < .15

def test_export(tmp_path):
    "The file knows neither head nor policy nor images; it predicts as the learner does"
    learn = quiet_fit(learner([remix()], path=tmp_path), 1, 1e-2)
    assert 'head' not in ' '.join(learn.model.state_dict())
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    cb = again.re_mix_match
    assert cb.head is None and cb.policy is None and cb.stream is None and not [k for k in cb.of_batch if k in vars(cb)]
    assert list(again.model.state_dict()) == list(learn.model.state_dict())
    x = DIGITS.test.subset(slice(20))
    with learn.no_bar(), again.no_bar(): was, now = (l.get_preds(dl=ImageDL(x, 10))[0] for l in (learn, again))
    assert torch.equal(was, now)
    quiet_fit(learn, 1, 1e-2)   # to export is not to end
    deepcopy(learn)

@opts
def test_save_and_load_of_fastai(opt, tmp_path):
    "fastai's own file with the optimiser: as long as without the method"
    learn = quiet_fit(learner([remix()], path=tmp_path, **OPTS[opt]), 1, 1e-2)
    learn.save('a')
    fresh = learner(path=tmp_path, **OPTS[opt])
    fresh.create_opt()
    fresh.load('a')
    assert differences(weights(learn), weights(fresh)) == []
    assert len(fresh.opt.all_params()) == len(learn.opt.all_params()) == len(list(learn.model.parameters()))


# -- resume ---------------------------------------------------------------------------------------
def whole_run(folder, cbs=None, n_acc=None, model=tiny_net, **kw):
    own = {k: kw.pop(k) for k in ('K', 'strong', 'prior', 'lambda_r', 'batchnorm') if k in kw}
    more = [] if n_acc is None else [GradientAccumulation(n_acc)]
    if callable(own.get('strong')): own['strong'] = own['strong']()
    learn = learner([remix(**own), Checkpoint(folder, every=2, keep=2), *more], digits_dls(steps=5), model, **kw)
    return quiet_fit(learn, 2, 1e-2, cbs=cbs)

def bins(): return CTAugment(rule='bins', cutout=1.)
RUNS = [(dict(), 'after_loss', 4), (dict(), 'before_batch', 9), (dict(), 'after_step', 5), (dict(n_acc=16), 'before_batch', 6),
        (OPTS['adamw'], 'after_pred', 5), (dict(strong=bins, K=1), 'after_batch', 7), (dict(lambda_r=0., batchnorm='joint'), 'after_pred', 8),
        (dict(model=partial(tiny_net, dropout=.3), prior=[.19] + [.09]*9), 'before_step', 4), (dict(splitter=by_halves), 'after_step', 8)]

@linux
@pytest.mark.parametrize('kw, event, n', RUNS)
def test_killed_and_resumed(kw, event, n, tmp_path):
    expected = read_checkpoint(whole_run(tmp_path/'a', **kw).checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        if not cb.training: return
        count[0] += 1
        if count[0] == n: die()
    assert in_child(lambda: whole_run(tmp_path/'b', Every(event, kill), **kw)) == signal.SIGKILL
    got = read_checkpoint(whole_run(tmp_path/'b', **kw).checkpoint.files()[-1])
    assert differences(expected, got) == []

def test_what_a_checkpoint_holds(tmp_path):
    "All that the method remembers, and the head's moments at the end of the optimiser's state"
    learn = whole_run(tmp_path)
    s, cb = read_checkpoint(learn.checkpoint.files()[-1]), learn.re_mix_match
    own = s['cbs']['re_mix_match']
    assert own['fifo'].shape == (128, 10) and own['fifo'][:118].std() < 1e-7 < own['fifo'][118:].std()
    assert not torch.equal(own['p_data'], torch.full((10,), .1)) and (own['policy']['rates'] < 1).sum() > (own['policy']['rates'] == -torch.inf).sum()
    assert torch.equal(own['head']['weight'], cb.head.weight) and torch.equal(own['generator'], cb.generator.get_state())
    state = s['opt']['state']
    assert len(state) == len(list(learn.model.parameters())) + 2 and state[-1]['do_wd'] is False
    assert state[-2]['grad_avg'].shape == (4, 8) and state[-2]['grad_avg'].any() and state[-2]['step'] == 10

def test_state_before_the_fit():
    "`load_state_dict` of a new callback, then a fit: head, averages and rates are those of the state"
    learn = quiet_fit(learner([remix()]), 1, 1e-2)
    state = deepcopy(learn.re_mix_match.state_dict())
    cb = remix(seed=7)
    cb.load_state_dict(deepcopy(state))
    seen = []
    quiet_fit(learner([cb]), 1, 1e-2, cbs=Every('before_train', lambda o: seen.append(deepcopy(cb.state_dict()))))
    assert differences(state, seen[0], skip=('sums',)) == []

def test_checkpoint_of_other_settings(tmp_path):
    "Other data, another policy, no head: refused, with the reason"
    learn = whole_run(tmp_path/'a')
    state = learn.re_mix_match.state_dict()
    other = remix(ImageDL(DIGITS.train.subset(slice(100)), 8, index=True, steps=4))
    other.load_state_dict(deepcopy(state))
    with pytest.raises(ValueError, match='now there are 100'): quiet_fit(learner([other]), 1)
    with pytest.raises(ValueError, match='other operations or bins'):
        remix(strong=CTAugment(ops=['rotate', 'invert'])).load_state_dict(deepcopy(state))
    last = learn.checkpoint.files()[-1]
    with pytest.raises(ValueError, match='optimiser='): whole_run(tmp_path/'a', lambda_r=0.)
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a whole checkpoint'): whole_run(tmp_path/'a')


# -- with the rest of fastai ----------------------------------------------------------------------
@opts
@pytest.mark.parametrize('trained', [False, True])
def test_lr_find_changes_nothing(opt, trained, recwarn):
    "And a fit after it is the fit that would have been: head, moments, rates, averages"
    a, b = (learner([remix()], **OPTS[opt]) for _ in range(2))
    if trained:
        for l in (a, b): quiet_fit(l, 1, 1e-2)
    at = b.dls.train.state_dict()
    with b.no_bar(): b.lr_find(num_it=6, show_plot=False)
    assert not [w for w in recwarn if 'optimizer state' in str(w.message)]
    b.dls.train.load_state_dict(at)   # the labelled images are the loader's own business
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    own = lambda l: (weights(l), l.re_mix_match.state_dict(), l.ema_teacher.state_dict(), l.opt.state_dict())
    assert differences(own(a), own(b)) == []

def test_lr_find_before_the_first_fit():
    learn = learner([cb := remix()])
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert cb.n_step == 0 and cb.fifo is None and cb.p_data is None and torch.equal(cb.policy.rates, CTAugment().rates)
    assert not [k for k in cb.of_batch if k in vars(cb)]

def test_gradient_accumulation():
    learn = quiet_fit(learner([cb := remix(), GradientAccumulation(16)]), 2, 1e-2)
    assert cb.n_step == 4 == learn.ema_teacher.n_updates and cb.n_batch == 8
    assert (cb.fifo[-8:].std(0) > 0).any() and (cb.fifo[:-8] == .1).all()   # the averages count batches

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('way', ['interleave', 'joint'])
def test_mixed_precision(way):
    "All forwards in bf16, also of the probe; targets, averages, losses and weights in fp32"
    seen, inside, probed = [], [], []
    learn = learner([cb := remix(batchnorm=way), MixedPrecision(AMPMode.BF16)], opt_func=partial(SGD, mom=.9))
    h = learn.model[-1].register_forward_hook(lambda m, i, o: inside.append(o.dtype) if m.training else None)
    def look(o): seen.extend([cb.total.dtype, o.pred.dtype, cb.q.dtype, cb.targets.dtype, cb.fifo.dtype, cb.p_data.dtype, cb.turn_logits.dtype])
    hook = lambda o: probed.append(learn.ema_teacher.teacher[-1].register_forward_hook(lambda m, i, o: probed.append(o.dtype)))
    class Late(Every): order = 95
    quiet_fit(learn, 1, 1e-2, cbs=[Every('after_pred', look), Late('before_train', hook)])
    h.remove(), probed.pop(0).remove()
    assert set(seen) == {torch.float32} and set(inside) == {torch.bfloat16} and set(probed[:4]) == {torch.bfloat16}
    assert {p.dtype for p in [*learn.model.parameters(), *cb.head.parameters()]} == {torch.float32}
    assert not torch.is_autocast_enabled('cpu') and np.isfinite(learn.recorder.losses).all()

def test_own_teacher_and_none():
    learn = quiet_fit(learner([EMATeacher(.5), remix()]), 1)
    assert learn.ema_teacher.decay == .5
    learn = quiet_fit(learner([remix(ema=None, strong=plain)]), 1)   # a policy that does not ask
    assert not hasattr(learn, 'ema_teacher')

@pytest.mark.slow
def test_compiled():
    learn = learner([remix()], model=lambda: torch.compile(tiny_net(), backend='eager'))
    other = learner([remix()])
    for l in (learn, other): quiet_fit(l, 1)
    for (k,v),w in zip(weights(other).items(), weights(learn).values()): torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5)

def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def test_ordinary_datablock(tmp_path):
    "A `DataBlock`, `unlabeled_dl` and a `vision_learner` with `Normalize`: the policy sees pictures, the network what it always does"
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(24, 34)), item_tfms=Resize(32), batch_tfms=[*aug_transforms(size=32), Normalize.from_stats(*imagenet_stats, cuda=False)])
    dls = block.dataloaders(list(range(34)), bs=8, num_workers=0, device='cpu')
    unl = unlabeled_dl(dls, list(range(100, 160)), num_workers=0)
    policy, seen = CTAugment(), []
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=keep_pool(cb := remix(unl, K=1, strong=policy, rampup=2)))
    class Look(CTAugment):
        def __call__(self, x, generator=None):
            seen.append((x.dtype, tuple(x.shape), float(x.min()), float(x.max())))
            return super().__call__(x, generator)
    policy.__class__ = Look
    low = []
    quiet_fit(learn, 1, 1e-3, cbs=Every('after_pred', lambda o: low.append(float(cb.pool.min()))))
    assert len(seen) == 3 and all(d == torch.float32 and s == (16, 3, 32, 32) and -1e-3 < a < b < 1.001 for d,s,a,b in seen)
    assert min(low) < -1.5   # normalised again
    assert np.isfinite(learn.recorder.losses).all() and np.isfinite([v for v in learn.recorder.values[-1] if v == v]).all()
    assert learn.recorder.metric_names[3:-1] == [*ReMixMatchCallback.terms] and cb.head.in_features == 512
    assert cb.n_step == 3 and len(learn.opt.param_lists) == 3 and not torch.equal(policy.rates, CTAugment().rates)
    learn.path = tmp_path
    learn.remove_cb(cb)
    learn.export('a.pkl')
    with learn.no_bar(): assert len(load_learner(tmp_path/'a.pkl').predict(picture(3))) == 3


# -- bad input ------------------------------------------------------------------------------------
nan, inf = float('nan'), float('inf')
@pytest.mark.parametrize('kw', [dict(K=0), dict(K=-1), dict(K=1.5), dict(T=0), dict(T=-1), dict(T=nan), dict(alpha=0), dict(alpha=nan), dict(lambda_u=-1), dict(lambda_u=nan),
    dict(lambda_u=inf), dict(lambda_u1=-1), dict(lambda_u1=nan), dict(lambda_u1=inf), dict(lambda_r=-1), dict(lambda_r=nan), dict(lambda_r=inf), dict(rampup=-1),
    dict(rampup=nan), dict(ema=1.5), dict(ema=nan), dict(batchnorm='separate'), dict(batchnorm='ghost'), dict(batchnorm=None)], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError) as e: ReMixMatchCallback(**kw)
    assert name in str(e.value).split(':')[0] and repr(value) in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('strong', ['cifar', 3, [plain]], ids=short)
def test_strong_is_no_function(strong):
    with pytest.raises(TypeError, match='strong: got'): ReMixMatchCallback(strong=strong)

def test_images_that_are_not_square():
    shape = 1, 8, 12
    net = lambda: nn.Sequential(tiny_net())
    refused(learner([remix()], own_dls(shape=shape)), 'lambda_r: images of (8, 12) pixels cannot be turned', 'lambda_r=0')
    quiet_fit(learner([remix(lambda_r=0.)], own_dls(shape=shape)), 1)

def conv_only(): return nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def test_network_without_a_dense_layer():
    learn = learner([cb := remix()], model=conv_only)
    refused(learn, 'model: it has no dense layer with 10 outputs', 'lambda_r=0')
    assert cb.head is None and len(learn.opt.all_params()) == 2
    learn = quiet_fit(learner([cb := remix(lambda_r=0.)], model=conv_only), 1)
    assert cb.head is None and cb.state_dict()['head'] is None

@pytest.mark.parametrize('c', [1, 9, 11])
@pytest.mark.parametrize('lambda_r', [0., .5])
def test_wrong_number_of_outputs(lambda_r, c): refused(learner([remix(lambda_r=lambda_r)], model=partial(tiny_net, c)), 'model: it', '10 outputs')

def test_classes_unknown():
    dls = own_dls()
    del dls.c
    refused(learner([remix()], dls), 'dls: it does not say its number of classes; set `dls.c`')

def test_probing_without_a_teacher():
    refused(learner([ReMixMatchCallback(rampup=0, ema=None)]), 'ema: this policy asks the averaged network')

def test_ramp_longer_than_the_training():
    refused(learner([ReMixMatchCallback(K=1)]), 'rampup: got 16384 updates', 'has 4', 'rampup=1 or so')
    learn = quiet_fit(learner([remix(rampup=8)]), 2)
    quiet_fit(learn, 1)   # the ramp is over: a short second fit is none of its business

def test_batches_of_two_sizes():
    refused(learner([remix()], digits_dls(6, ubs=14)), 'unlabeled: batches of 14, the labelled ones have 6', "batchnorm='joint'")
    quiet_fit(learner([remix(batchnorm='joint')], digits_dls(6, ubs=14)), 1)
    quiet_fit(learner([remix(K=8)], digits_dls(2)), 1)   # fewer rows than groups

def test_loaders():
    refused(learner([remix(ImageDL(DIGITS.train.subset(slice(5)), 8, index=True))]), 'unlabeled: 5 images do not fill one batch of 8')
    refused(learner([remix()], mixed_dls(DIGITS, 40, bs=16, steps=4, valid=40, device='cpu')), 'dls.train: it mixes known and unknown labels', 'ReMixMatchCallback')
    refused(learner([remix(loader(Items(shape=(1, 12, 12))))], own_dls()), 'unlabeled: its images are (1, 12, 12)')
    refused(learner([remix()], own_dls(bs=1)), 'dls.train: a batch of one labelled image')
    five = own_dls(shape=(5, 8, 8))
    refused(learner([remix()], five, partial(tiny_net, channels=5)), 'images of 5 channels')

@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
def test_bad_pixels(where):
    dls = own_dls()
    (dls.train if where == 'labelled' else dls.unlabeled).dataset.x[:, 0, 3, 3] = nan
    refused(learner([remix()], dls), f'step 0: the {where} images are not finite', error=FloatingPointError)

def test_images_of_bytes_range():
    items = Items()
    items.x = items.x*255
    refused(learner([remix()], own_dls(items)), 'strong: the images leave [0,1]')

def test_label_outside_the_classes():
    items = Items()
    items.y = items.y + 5
    refused(learner([remix()], own_dls(items)), 'step 0', 'label lies outside the 10 classes')

@pytest.mark.parametrize('term', ['loss_x', 'loss_r'])
def test_bad_loss(term):
    "The step and the name of the term; a head that went wrong is found by its own"
    def spoil(o):
        if cb.n_step != 2: return
        with torch.no_grad(): (cb.head if term == 'loss_r' else learn.model[-1]).bias.fill_(nan)
    learn = learner([cb := remix()])
    with pytest.raises(FloatingPointError, match=f'step 2: the loss term {term} is not finite'): quiet_fit(learn, 1, cbs=Every('before_batch', spoil))
    assert cb.n_step == 2

@pytest.mark.parametrize('words, says', [(['--opt', 'rmsprop'], "opt: got 'rmsprop', expected one of adam, sgd"), (['--lr', '0'], 'lr: got 0'), (['--lr', '-1'], 'lr: got -1')], ids=str)
def test_command_line(words, says, tmp_path, capsys):
    small = ['--steps', '4', '--evals', '2', '--bs', '8', '--out', str(tmp_path)]
    assert main(['train', 'remixmatch', *small, *words]) == 1
    err = capsys.readouterr().err
    assert says in err and 'Traceback' not in err and not list(tmp_path.rglob('*.pt'))
