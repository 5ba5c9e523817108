"What the pages `03_core` and `17_mixmatch` cannot say in passing."
import math
from copy import deepcopy
from functools import partial

import fastprogress.fastprogress, fastai.callback.schedule # fit_one_cycle, lr_find
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import FetchPredsCallback
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import TfmdDL
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage

from ssl_notes.core import (EMATeacher, ViewStream, ema_update, frozen_bn_stats, linear_rampup,
                            one_hot, sigmoid_rampup, unwrap)
from ssl_notes.data import ImageDL, ImageSet
from ssl_notes.mixmatch import (MixMatchCallback, guess_labels, interleave, loss_u, loss_x, mixup, mixup_lambda,
                                sharpen)

from helpers import DIGITS, Every, differences, digits_dls, learner, quiet_fit, tiny_net, weights

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)
def probabilities(seed, n, c, spread=3.):
    return (spread*torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(1)
def entropy(p): return -torch.special.xlogy(p, p).sum(-1)


# -- equations ------------------------------------------------------------------------------------
@quick
@given(seeds, st.integers(1, 8), st.integers(2, 100), st.floats(.02, 1), st.floats(.1, 20))
def test_sharpen(seed, n, c, T, spread):
    p = probabilities(seed, n, c, spread)
    s = sharpen(p, T)
    assert torch.allclose(s.sum(1), torch.ones(n, dtype=s.dtype)) and (s >= 0).all()
    assert (entropy(s) <= entropy(p) + 1e-9).all()
    order = p.argsort(1)
    assert (s.gather(1, order).diff(dim=1) >= 0).all()   # the order of the classes stays
    if T > .5 and spread < 4: assert torch.allclose(s, p**(1/T)/(p**(1/T)).sum(1, keepdim=True))

@quick
@given(seeds, st.integers(2, 10), st.floats(1, 50))
def test_sharpen_above_one_flattens(seed, c, T):
    p = probabilities(seed, 4, c)
    assert (entropy(sharpen(p, T)) >= entropy(p) - 1e-9).all()

@pytest.mark.parametrize('p, T', [([1., 0, 0], .5), ([1., 0, 0], 1e-3), ([1-1e-7, 1e-7, 0], .5), ([.5, .5, 0], 1e-4)])
def test_sharpen_at_the_edge(p, T):
    s = sharpen(torch.tensor([p]), T)
    assert s.isfinite().all() and abs(float(s.sum()) - 1) < 1e-6

@quick
@given(seeds, st.integers(1, 4), st.integers(1, 8), st.integers(2, 10))
def test_guess_is_the_mean_of_probabilities(seed, k, b, c):
    z = torch.randn(k, b, c, generator=torch.Generator().manual_seed(seed))
    q = guess_labels(z)
    assert torch.allclose(q, sum(F.softmax(o, 1) for o in z)/k, atol=1e-6)
    assert guess_labels(z.bfloat16()).dtype == torch.float32

@quick
@given(seeds, st.integers(1, 200), st.floats(.01, 20))
def test_mixup(seed, n, alpha):
    lam = mixup_lambda(np.random.RandomState(seed), n, alpha)
    assert lam.shape == (n,) and (lam >= .5).all() and (lam <= 1).all()
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(n, 1, 2, 2, generator=g), torch.rand(n, 1, 2, 2, generator=g)
    m = mixup(a, b, lam)
    assert (m >= torch.minimum(a, b) - 1e-6).all() and (m <= torch.maximum(a, b) + 1e-6).all()   # between the two
    assert ((m-a).abs() <= (m-b).abs() + 1e-6).all()   # and nearer to the first
    assert torch.equal(mixup(a, b, torch.ones(n)), a)
    p, q = probabilities(seed, n, 5).float(), probabilities(seed+1, n, 5).float()
    assert torch.allclose(mixup(p, q, lam).sum(1), torch.ones(n))

@quick
@given(st.integers(1, 70), st.integers(1, 6))
def test_interleave(n, k):
    "Twice is nothing; no row is lost; the first batch holds an equal part of each"
    rows = [torch.arange(n) + n*i for i in range(k)]
    once = interleave(rows)
    assert [len(o) for o in once] == [n]*k
    assert torch.equal(torch.cat(once).sort().values, torch.arange(n*k))
    for a,b in zip(rows, interleave(once)): assert torch.equal(a, b)
    share = torch.bincount(once[0]//n, minlength=k)
    assert share.max() - share.min() <= 1
    if k > 1: assert torch.equal(once[0], interleave([r.clone() for r in rows])[0])

def test_interleave_as_the_official_code():
    "google-research/mixmatch, `interleave` with nu = 2 and batches of 64: groups of 21, 21, 22"
    xy = [np.arange(64) + 64*i for i in range(3)]
    off = [0, 21, 42, 64]
    parts = [[v[off[p]:off[p+1]] for p in range(3)] for v in xy]
    for i in range(1, 3): parts[0][i], parts[i][i] = parts[i][i], parts[0][i]
    for a,b in zip(parts, interleave([torch.from_numpy(o) for o in xy])): assert np.concatenate(a).tolist() == b.tolist()

@quick
@given(st.lists(st.integers(-3, 12), min_size=1, max_size=9), st.integers(2, 10))
def test_one_hot(y, c):
    rows = one_hot(torch.tensor(y), c)
    for i,k in enumerate(y):
        assert rows[i].tolist() == [float(k == j) for j in range(c)]
    assert torch.equal(one_hot(rows, c), rows)

@quick
@given(st.integers(0, 10**6), st.integers(0, 10**5))
def test_ramps(s, length):
    for f,low in ((linear_rampup, 0.), (sigmoid_rampup, math.exp(-5))):
        assert low <= f(s, length) <= f(s+1, length) <= 1
        assert f(max(s, length), length) == 1
    if 0 < s < length: assert linear_rampup(s, length) == s/length

@quick
@given(seeds, st.integers(1, 9), st.integers(2, 10))
def test_losses_against_torch(seed, n, c):
    z = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = probabilities(seed+1, n, c)
    assert torch.allclose(loss_x(z, p), F.cross_entropy(z, p))
    assert torch.allclose(loss_u(z, p), ((z.softmax(1)-p)**2).sum()/(n*c))


# -- averages -------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 6))
def test_ema_against_torch(seed, decay, dtype, steps):
    g = torch.Generator().manual_seed(seed)
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    oracle = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    teacher, by_hand = [p.detach().clone() for p in student.parameters()], [p.detach().clone() for p in student.parameters()]
    oracle.update_parameters(student)   # the first time it copies
    for _ in range(steps):
        with torch.no_grad():
            for p in student.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
        oracle.update_parameters(student)
        ema_update(teacher, [p.detach() for p in student.parameters()], decay)
        by_hand = [decay*a + (1-decay)*p.detach() for a,p in zip(by_hand, student.parameters())]
    for t,o,h in zip(teacher, oracle.module.parameters(), by_hand):
        assert torch.equal(t, o) and torch.allclose(t, h, atol=1e-5)

@pytest.mark.parametrize('buffers', ['copy', 'average', 'own'])
def test_teacher_buffers(buffers):
    "Against a second bookkeeping, written down here step by step"
    learn = learner([EMATeacher(.7, buffers), MixMatchCallback(ema=None)])
    bn = lambda m: {k: v.clone() for k,v in m.named_buffers()}
    par = {k: v.detach().clone() for k,v in learn.model.named_parameters()}
    buf, n = bn(learn.model), []
    def step(cb):
        n.append(1)
        for k,v in cb.model.named_parameters(): par[k].lerp_(v.detach(), 1-.7)
        for k,v in cb.model.named_buffers():
            if buffers == 'average' and v.is_floating_point(): buf[k].lerp_(v, 1-.7)
            elif buffers != 'own': buf[k].copy_(v)
    quiet_fit(learn, 2, 2e-3, cbs=Every('after_step', step))
    t = learn.ema_teacher.teacher
    assert len(n) == learn.ema_teacher.n_updates == 8 and not t.training
    assert not any(p.requires_grad for p in t.parameters())
    for k,v in t.named_parameters(): torch.testing.assert_close(v, par[k])
    for k,v in t.named_buffers(): torch.testing.assert_close(v, buf[k])
    assert int(learn.model[1].num_batches_tracked) == 8   # one update of the statistics in each step, not four

def test_teacher_of_weight_norm():
    net = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 16)), nn.ReLU(), weight_norm(nn.Linear(16, 10)))
    learn = learner([MixMatchCallback(ema=.5)], model=lambda: net)
    par = {k: v.detach().clone() for k,v in net.named_parameters()}
    def step(cb):
        for k,v in cb.model.named_parameters(): par[k].lerp_(v.detach(), .5)
    quiet_fit(learn, 2, 2e-3, cbs=Every('after_step', step))
    t = learn.ema_teacher.teacher
    assert any('original0' in k for k in par)
    for k,v in t.named_parameters(): torch.testing.assert_close(v, par[k])
    with learn.no_bar(): p = learn.get_preds()[0]
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    torch.testing.assert_close(p.as_subclass(torch.Tensor), t(x).softmax(1), atol=1e-4, rtol=1e-4)

def test_model_with_a_part_called_module():
    "Only DDP and `torch.compile` are unwrapped, not a part of the user's network that is called `module`"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 10)
        def forward(self, x): return self.head(self.module(x))
    net = Net()
    assert unwrap(net) is net
    assert unwrap(nn.DataParallel(net)) is net
    learn = quiet_fit(learner([MixMatchCallback()], model=lambda: net), 1)
    with learn.no_bar(): assert learn.get_preds()[0].shape == (40, 10)

def test_two_teachers_are_refused():
    "A teacher that is added after a method which brought its own: an error before the first step"
    learn = learner([MixMatchCallback(), EMATeacher(.5)])
    w = weights(learn)
    with pytest.raises(ValueError, match='ema'): quiet_fit(learn, 1)
    assert differences(w, weights(learn)) == []
    quiet_fit(learner([EMATeacher(.5), MixMatchCallback()]), 1)
    quiet_fit(learner([MixMatchCallback(ema=None), EMATeacher(.5)]), 1)


# -- frozen statistics ----------------------------------------------------------------------------
def test_every_kind_of_batchnorm():
    net = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2),
                         nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)])
    flags = lambda: [getattr(m, 'track_running_stats', None) for m in net]
    before = flags()
    assert before == [True]*4 + [False, None]
    with frozen_bn_stats(net):
        assert flags() == [False]*5 + [None]
        with frozen_bn_stats(net): pass
        assert flags() == [False]*5 + [None]   # a block inside does not thaw the outer one
    assert flags() == before
    with pytest.raises(KeyError), frozen_bn_stats(net): raise KeyError
    assert flags() == before

def test_one_update_of_the_statistics_a_step():
    "By the labelled chunk alone, in the official order of forwards"
    x = []
    def hook(m, i, o):
        if m.training and m.track_running_stats: x.append(i[0].detach().as_subclass(torch.Tensor).clone())
    learn = learner([MixMatchCallback()])
    bn = learn.model[1]
    h = bn.register_forward_hook(hook)
    quiet_fit(learn, 1)
    h.remove()
    assert len(x) == 4 and all(len(o) == 8 for o in x)
    mean = torch.zeros(8)
    for o in x: mean = .9*mean + .1*o.mean((0, 2, 3))
    torch.testing.assert_close(bn.running_mean, mean)

def test_frozen_layers_stay_frozen():
    "fastai's `BnFreeze` is not undone by the forwards that guess labels"
    modes = []
    learn = learner([MixMatchCallback(), BnFreeze()])
    learn.model[1].requires_grad_(False)
    quiet_fit(learn, 1, cbs=Every('after_pred', lambda cb: modes.append(cb.model[1].training)))
    assert modes == [False]*4
    assert int(learn.model[1].num_batches_tracked) == 0


# -- streams of views -----------------------------------------------------------------------------
def numbered(n): return ImageSet(torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 1, 2, 2).contiguous())

class Pair:
    "Items whose pixels are their positions; at module level, as worker processes need it."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return TensorImage(torch.full((1, 2, 2), float(i))), i % 3

def flat(stream, batches):
    idx = []
    for _ in range(batches):
        views, i = next(stream)
        assert views.shape[:2] == (stream.K, len(i)) and i.dtype == torch.int64
        pos = (views*255).round() if stream.own else views
        for v in pos: assert torch.equal(v[:, 0, 0, 0].long(), i)   # each view shows the image that it says
        idx += i.tolist()
    return idx

@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 12), st.integers(1, 3), seeds, st.booleans())
def test_stream_of_image_dl(n, bs, K, seed, endless):
    "Each run of n positions is a permutation, whatever the batch size"
    if bs > n: bs = n
    s = ViewStream(ImageDL(numbered(n), bs, seed=seed, index=True, steps=3 if endless else None), K)
    idx = flat(s, -(-3*n//bs))
    for i in range(3): assert sorted(idx[i*n:(i+1)*n]) == list(range(n))
    assert idx[:n] != idx[n:2*n] or n < 5

@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(2, 12), st.integers(1, 3), seeds)
def test_stream_of_fastai_loader(n, bs, K, seed):
    "No image twice in a permutation; the remainder that fills no batch is left out, another one each time"
    if bs > n: bs = n
    s = ViewStream(TfmdDL(Pair(n), bs=bs, num_workers=0), K, seed)
    each = n//bs
    for _ in range(3):
        idx = flat(s, each)
        assert len(set(idx)) == each*bs and set(idx) <= set(range(n))

@settings(deadline=None, max_examples=20)
@given(st.integers(4, 30), st.integers(2, 4), st.integers(0, 12), seeds, st.booleans())
def test_stream_goes_on(n, bs, taken, seed, own):
    make = lambda s: ViewStream(ImageDL(numbered(n), bs, seed=s, index=True) if own
                                else TfmdDL(Pair(n), bs=bs, num_workers=0), 2, s)
    a, b = make(seed), make(seed+1)
    flat(a, taken)
    b.load_state_dict(deepcopy(a.state_dict()))
    assert flat(a, 9) == flat(b, 9)
    with pytest.raises(ValueError, match='unlabelled images'):
        other = ViewStream(TfmdDL(Pair(n+1), bs=bs, num_workers=0), 2)
        other.load_state_dict(a.state_dict())

def test_stream_with_workers():
    "The same order as without, and it can be saved and restored"
    make = lambda w: ViewStream(TfmdDL(Pair(13), bs=4, num_workers=w), 2, 5)
    a, b = make(2), make(0)
    first = flat(a, 4)
    assert first == flat(b, 4)
    state = a.state_dict()
    rest = flat(b, 5)
    c = make(2)
    c.load_state_dict(state)
    assert flat(c, 5) == rest
    for s in (a, c): s.it = None

def test_views_are_not_alike():
    s = ViewStream(digits_dls().unlabeled, 3)
    v, _ = next(s)
    assert not torch.equal(v[0], v[1]) and not torch.equal(v[1], v[2])


# -- joining and leaving a Learner ----------------------------------------------------------------
@pytest.mark.parametrize('how', ['learner', 'add_cb', 'fit', 'class', 'add_class'])
def test_ways_to_add(how):
    if how == 'learner': learn = quiet_fit(learner([MixMatchCallback()]), 1)
    if how == 'class': learn = quiet_fit(learner(MixMatchCallback), 1)
    if how == 'add_cb': learn = quiet_fit(learner().add_cb(MixMatchCallback()), 1)
    if how == 'add_class': learn = quiet_fit(learner().add_cbs(MixMatchCallback), 1)
    if how == 'fit': learn = quiet_fit(learner(), 1, cbs=MixMatchCallback())
    expected = quiet_fit(learner([MixMatchCallback()]), 1)
    assert differences(weights(expected), weights(learn)) == []
    assert hasattr(learn, 'mix_match') == (how != 'fit')

@pytest.mark.parametrize('fitted', [False, True])
def test_leaves_no_trace(fitted):
    learn = learner()
    quiet_fit(learn, 1)
    names = lambda: (sorted(learn.__dict__.keys()), [type(c) for c in learn.cbs], learn.metrics.attrgot('name'))
    before, model, loss = names(), learn.model, learn.loss_func
    cb = MixMatchCallback()
    learn.add_cb(cb)
    assert {'mix_match', 'ema_teacher', 'loss_columns'} <= learn.__dict__.keys()
    if fitted: quiet_fit(learn, 1)
    learn.remove_cb(cb)
    assert names() == before and learn.model is model and learn.loss_func is loss and cb.learn is None
    quiet_fit(learn, 1)
    assert 'loss_x' not in learn.recorder.metric_names
    learn.add_cb(cb)   # and it can come back
    quiet_fit(learn, 1)
    learn.remove_cb(MixMatchCallback)   # also by its class
    assert names() == before

def test_callback_can_be_copied_and_pickled():
    "After training it holds no graph and no batch"
    learn = quiet_fit(learner([MixMatchCallback()]), 1)
    deepcopy(learn.mix_match.state_dict())
    held = [k for k,v in learn.mix_match.__dict__.items() for t in (v if isinstance(v, (list, tuple)) else [v])
            if isinstance(t, torch.Tensor) and (t.requires_grad or t.numel() > 10)]
    assert held == []
    deepcopy(learn)


# -- fastai's other callbacks ---------------------------------------------------------------------
def test_all_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(fastprogress.fastprogress.ConsoleMasterBar, 'update_graph', lambda s, g, *b: drawn.append(g))
    fetch = FetchPredsCallback()
    learn = learner([fetch, SaveModelCallback('accuracy'), EarlyStoppingCallback('loss_u', patience=9), CSVLogger(),
                     ShowGraphCallback(), MixMatchCallback(rampup=4)], path=tmp_path)
    with learn.no_logging(): learn.fit(3, 2e-3)
    assert fetch.preds[0].shape == (40, 10) and hasattr(learn, 'loss_columns')
    rows = [l.split(',') for l in (tmp_path/'history.csv').read_text().splitlines()]
    assert len(rows) == 4 and all(len(r) == len(rows[0]) for r in rows)
    col = {n: [float(r[i]) for r in rows[1:]] for i,n in enumerate(rows[0]) if n != 'time'}
    assert col['weight'] == [75*1.5/4, 75., 75.] and set(col) >= {'loss_x', 'loss_u', 'valid_loss', 'accuracy'}
    assert all(0 <= v <= 1 for v in col['accuracy']) and all(0 < v < .2 for v in col['loss_u'])
    assert (tmp_path/'models/model.pth').exists() and len(drawn) == 3

def test_graph_shows_the_validation_loss(monkeypatch):
    drawn = []
    monkeypatch.setattr(fastprogress.fastprogress.ConsoleMasterBar, 'update_graph', lambda s, g, *b: drawn.append(g))
    learn = learner([ShowGraphCallback(), MixMatchCallback()])
    with learn.no_logging(): learn.fit(2, 2e-3)
    at = learn.recorder.metric_names.index('valid_loss') - 1
    assert list(drawn[-1][1][1]) == [v[at] for v in learn.recorder.values]

@pytest.mark.parametrize('kw', [dict(train_metrics=True), dict(add_time=False), dict(train_metrics=True, add_time=False)])
def test_columns_of_the_recorder(kw):
    learn = learner([MixMatchCallback(rampup=0)])
    for k,v in kw.items(): setattr(learn.recorder, k, v)
    lines = []
    with learn.no_bar():
        learn.logger = lambda o: lines.append(list(o))
        learn.fit(2, 2e-3)
    names = learn.recorder.metric_names
    assert len(lines) == 2 and all(len(l) == len(names) for l in lines)
    row = dict(zip(names, lines[-1]))
    assert row['weight'] == 75 and 0 < row['loss_u'] < .2 and row['loss_x'] > 1
    if 'train_accuracy' in row: assert 0 <= row['train_accuracy'] <= 1 and 0 <= row['valid_accuracy'] <= 1

def test_columns_after_lr_find():
    "Means of their own epoch only"
    learn = learner([MixMatchCallback(rampup=0)])
    quiet_fit(learn, 1)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    quiet_fit(learn, 1)
    assert learn.mix_match.sums['_n'] == 4

def test_lr_find_changes_nothing():
    a, b = learner([MixMatchCallback()]), learner([MixMatchCallback()])
    for l in (a, b): quiet_fit(l, 1)
    with b.no_bar(): b.lr_find(num_it=10, show_plot=False)
    assert differences(weights(a), weights(b)) == []
    assert differences(a.ema_teacher.state_dict(), b.ema_teacher.state_dict()) == []
    assert differences(a.mix_match.state_dict(), b.mix_match.state_dict(), skip=('sums',)) == []

def test_validate_returns_what_it_always_does():
    learn = quiet_fit(learner([MixMatchCallback()]), 1)
    with learn.no_bar(), learn.no_logging(): assert len(learn.validate()) == 2

def test_learner_with_another_loss_and_metric():
    "The loss of the Learner is for validation; a method brings its own terms"
    learn = quiet_fit(learner([MixMatchCallback()], loss_func=nn.CrossEntropyLoss(label_smoothing=.1)), 1)
    assert all(map(math.isfinite, learn.recorder.values[-1]))

def test_accumulated_gradients():
    "Two half batches of labels count as one update of weights, teacher and ramp"
    learn = quiet_fit(learner([MixMatchCallback(), GradientAccumulation(16)]), 2)
    assert learn.mix_match.n_step == learn.ema_teacher.n_updates == 4

def test_export(tmp_path):
    "The file holds the networks and neither the images nor the last batch; predictions are the same"
    x = DIGITS.train.x.repeat(20, 1, 1, 1)
    dls = digits_dls(bs=64)
    learn = learner([MixMatchCallback(unlabeled=ImageDL(x, 64, index=True))], dls=dls, path=tmp_path)
    quiet_fit(learn, 1, 1e-2)
    learn.export('a.pkl')
    size = (tmp_path/'a.pkl').stat().st_size
    quiet_fit(learn, 1)
    learn.export('b.pkl')
    learner([MixMatchCallback()], path=tmp_path).export('fresh.pkl')
    fresh = (tmp_path/'fresh.pkl').stat().st_size
    assert size < fresh + 20_000, f'{size} bytes, {fresh} before training'   # one batch of rows alone would be 48 kB
    again = load_learner(tmp_path/'b.pkl')
    dl = lambda l: l.dls.test_dl(DIGITS.test.x[:50])
    with learn.no_bar(), again.no_bar(): a, b = learn.get_preds(dl=dl(learn))[0], again.get_preds(dl=dl(again))[0]
    assert torch.equal(a, b)
    with again.no_bar(), learn.no_bar(): assert again.predict(DIGITS.test.x[0])[0] == learn.predict(DIGITS.test.x[0])[0]

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('batchnorm', ['interleave', 'joint'])
def test_mixed_precision(batchnorm):
    seen, inside = [], []
    learn = learner([MixMatchCallback(batchnorm=batchnorm), MixedPrecision(AMPMode.BF16)], opt_func=partial(SGD, mom=.9))
    h = learn.model[-1].register_forward_hook(lambda m, i, o: inside.append((o.dtype, torch.is_grad_enabled())) if m.training else None)
    def look(cb): seen.append((cb.mix_match.targets.dtype, cb.mix_match.total.dtype, cb.pred.dtype))
    quiet_fit(learn, 2, 1e-2, cbs=Every('after_pred', look))
    h.remove()
    assert set(seen) == {(torch.float32,)*3}
    assert set(inside) == {(torch.bfloat16, True), (torch.bfloat16, False)}   # also where labels are guessed
    assert not torch.is_autocast_enabled('cpu')
    assert {v.dtype for v in weights(learn).values() if v.is_floating_point()} == {torch.float32}
    assert np.isfinite(learn.recorder.losses).all()

def test_compiled():
    "`torch.compile` with the quick backend; teacher and checkpoint see the bare module"
    learn = learner([MixMatchCallback()], model=lambda: torch.compile(tiny_net(), backend='eager'))
    plain = learner([MixMatchCallback()])
    for l in (learn, plain): quiet_fit(l, 1)
    for k,v in weights(unwrap(learn.model)).items(): torch.testing.assert_close(v, weights(plain)[k], rtol=1e-3, atol=1e-5)
    assert type(learn.ema_teacher.teacher) is nn.Sequential

def test_channels_last():
    a = quiet_fit(learner([MixMatchCallback()], opt_func=SGD), 1)
    b = learner([MixMatchCallback(), ChannelsLast()], model=lambda: tiny_net().to(memory_format=torch.channels_last), opt_func=SGD)
    quiet_fit(b, 1)
    for k,v in weights(a).items(): torch.testing.assert_close(v, weights(b)[k], rtol=1e-3, atol=1e-4)
