"Between-class learning: equations for any numbers, partners, normalisation, Nesterov, exact resume, bad input, fastai's other features."
import math, pickle, random, signal
from copy import deepcopy
from functools import partial

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import Subset
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.augment import RandomErasing, Resize
from fastai.vision.core import PILImage, PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.augment import zero_crop
from ssl_notes.bc_learning import (BCLearningCallback, BCNorm, ZeroCrop, bc_dls, bc_loss, bc_mix, bc_plus_mix, bc_ratio, bc_target, chainer_nesterov,
                                   mix_waves, other_class, step_schedule, training_labels, zero_mean)
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.mixup import PaperMixUp

from helpers import (die, differences, DIGITS, digits_dls, Every, images, in_child, Items, learner, linux, loader, own_dls,
                     parameters, quiet_fit, refused, seeded, tiny_net, weights)

BC = BCLearningCallback
quick = settings(max_examples=40, deadline=None)
nan, inf = float('nan'), float('inf')
t32, t64 = torch.tensor, partial(torch.tensor, dtype=torch.float64)
sizes = st.integers(1, 6)

def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def small_dls(n=40, bs=8, **kw): return bc_dls(DIGITS, n, bs=bs, valid=40, device='cpu', **kw)
def outcome(learn): return weights(learn), learn.bc_learning.state_dict(), learn.opt.state_dict(), [float(o) for o in learn.recorder.losses]


# -- mixtures -------------------------------------------------------------------------------------
A = t64([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]).view(1, 3, 2, 2)/255
B = t64([200, 0, 0, 200, 100, 50, 50, 100, 0, 255, 255, 0]).view(1, 3, 2, 2)/255
CIFAR = dict(mean=t64([125.3, 123., 113.9])/255, std=t64([63., 62.1, 66.7])/255)
CIFAR_PLUS = dict(mean=t64([4.6, 2.24, -6.84])/255, std=t64([55.9, 53.7, 56.5])/255, plus=True)

def test_labels_by_hand():
    "The label has the ratio itself, also where the images have another share"
    assert bc_target(t32([1]), t32([3]), t32([.25]), 4).tolist() == [[0, .25, 0, .75]]
    assert bc_target(t32([1, 0]), t32([0, 1]), t32([1., 0.]), 2).tolist() == [[0, 1], [0, 1]]

def test_mixtures_by_hand():
    "Two images of 2x2 pixels with the constants of CIFAR-10"
    r = t32([.25])
    got = bc_mix(*(BCNorm(**CIFAR)(o.float()) for o in (A, B)), r)
    want = [0.43174603, -1.90952381, -1.86984127, 0.55079365, -0.57165862, -1.13526570, -1.09500805, -0.45088567, -1.37031484, 1.53448276, 1.57196402, -1.25787106]
    np.testing.assert_allclose(got.flatten(), want, atol=2e-6)
    a, b = (BCNorm(**CIFAR_PLUS)(o.float()) for o in (A, B))
    s = [o.std(correction=0) for o in (a, b)]
    np.testing.assert_allclose(s, [.69475773, 1.74580849], atol=1e-6)
    np.testing.assert_allclose(bc_ratio(s[0][None], s[1][None], r), [.45581495], atol=1e-6)
    got = bc_plus_mix(a, b, r)
    want = [0.61225791, -2.01565090, -1.90078197, 0.95686470, -0.25002122, -0.84423250, -0.72465758, 0.10870354, -0.91346678, 2.66008719, 2.77373628, -0.57251953]
    np.testing.assert_allclose(got.flatten(), want, atol=3e-6)
    assert math.isclose(got.std(correction=0), 1.47787373, abs_tol=2e-6)

@pytest.mark.parametrize('s1, s2, r, p, w1, w2', [(1, 1, .3, .3, .39391930, .91914503), (2, 1, .5, .33333333, .44721360, .89442719), (1, 2, .5, .66666667, .89442719, .44721360),
                                                  (.5, 1.5, .2, .42857143, .6, .8), (1.2, .8, .9, .85714286, .98639392, .16439899)])
def test_ratio_by_hand(s1, s2, r, p, w1, w2):
    got = bc_ratio(t64([s1]), t64([s2]), t64([r]))
    np.testing.assert_allclose(got, [p], atol=1e-8)
    np.testing.assert_allclose(mix_waves(t64([[1, 0]]), t64([[0, 1]]), got), [[w1, w2]], atol=1e-8)

positive = st.floats(1e-3, 1e3)
@quick
@given(positive, positive, st.floats(.001, .999))
def test_ratio_is_what_it_shall_be(s1, s2, r):
    "p s1 : (1-p) s2 = r : (1-r), as in the paper's form; exchanging both sounds and r gives 1-p"
    a, b, c = (t64([o]) for o in (s1, s2, r))
    p = float(bc_ratio(a, b, c))
    assert math.isclose(p*s1/(p*s1 + (1-p)*s2), r, rel_tol=1e-9)
    assert math.isclose(p, 1/(1 + s1/s2*(1-r)/r), rel_tol=1e-9)
    assert math.isclose(p, 1 - float(bc_ratio(b, a, 1-c)), rel_tol=1e-6, abs_tol=1e-12)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_ratio_at_the_ends(dtype):
    "0 and 1 are exact; an image without contrast gets what the other leaves, two of them p = r; nothing is nan"
    one = torch.ones(1, dtype=dtype)
    for s1 in (0, 1e-30, 1., 1e4):
        for s2 in (0, 1e-30, 1., 1e4):
            assert bc_ratio(s1*one, s2*one, 0*one) == 0 and bc_ratio(s1*one, s2*one, one) == 1
            assert 0 <= bc_ratio(s1*one, s2*one, .3*one) <= 1
    assert bc_ratio(0*one, 0*one, .25*one) == .25
    assert bc_ratio(0*one, one, .25*one) == 1 and bc_ratio(one, 0*one, .25*one) < 1e-9

def test_ratio_in_half_precision():
    "A weak contrast is no missing one"
    got = bc_ratio(*(t32([v], dtype=torch.float16) for v in (.004, .001)), t32([.5]))
    np.testing.assert_allclose(got.float(), [.2], atol=2e-3)

def test_flat_images():
    "All-black images (after the mean is taken away: zeros) mix without nan, forward and back"
    x = torch.zeros(3, 1, 4, 4)
    x[2] = torch.randn(1, 4, 4)
    for r in (0., .3, 1.):
        out = bc_plus_mix(x, x.flip(0), torch.full((3,), r))
        assert out.isfinite().all() and not out[1].any()

@quick
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_energy(seed, p):
    "Independent waves of strength 1 give one of strength 1; without the root they would not"
    g = seeded(seed)
    x1, x2 = (torch.randn(1, 20000, generator=g, dtype=torch.float64) for _ in range(2))
    w = mix_waves(x1, x2, t64([p]))
    assert math.isclose(w.std(), 1, abs_tol=.05)
    torch.testing.assert_close(w, bc_mix(x1, x2, t64([p]))/math.hypot(p, 1-p))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixtures_keep_the_type(dtype):
    x = torch.randn(4, 2, 3, 3, generator=seeded()).to(dtype)
    r = t32([0., .25, .5, 1.])
    for f in (bc_mix, mix_waves, bc_plus_mix):
        out = f(x, x.flip(0), r)
        assert out.dtype == dtype and out.shape == x.shape
        torch.testing.assert_close(out[0], x[3])
        torch.testing.assert_close(out[3], x[3])
    assert bc_mix(x[:0], x[:0], r[:0]).shape == (0, 2, 3, 3)

@pytest.mark.parametrize('f', [bc_mix, mix_waves, bc_plus_mix])
def test_mixtures_refuse(f):
    x, r = torch.rand(4, 1, 2, 2), torch.rand(4)
    for bad in (r[:3], r[:, None], r.sum()):
        with pytest.raises(ValueError, match='r: got shape'): f(x, x, bad)
    for v in (-.01, 1.01, nan):
        with pytest.raises(ValueError, match='expected numbers in'): f(x, x, torch.full((4,), v))
    bytes_ = (255*x).byte()
    with pytest.raises(TypeError, match='uint8'): f(bytes_, bytes_, r)   # r would become 0

# -- loss -----------------------------------------------------------------------------------------
def test_loss_by_hand():
    z = t64([[2, 1, 0], [0, 0, 0], [-1, 3, .5]]).requires_grad_()
    t = t64([[.7, .3, 0], [.25, 0, .75], [0, 1, 0]])
    for i,want in enumerate((.09674166, .53627714, .09567433)): assert math.isclose(bc_loss(z[i:i+1], t[i:i+1]).detach(), want, abs_tol=1e-8)
    loss = bc_loss(z, t)
    loss.backward()
    assert math.isclose(loss.detach(), .24289771, abs_tol=1e-8)
    np.testing.assert_allclose(z.grad, [[-.01158635, -.01842384, .03001019], [.02777778, .11111111, -.13888889], [.00554817, -.03041336, .02486519]], atol=1e-8)

@quick
@given(st.integers(0, 10**6), sizes, st.integers(2, 6))
def test_loss_against_torch(seed, n, c):
    "torch's `batchmean`; the gradient is that of cross-entropy; least, 0, where the prediction is the label"
    g = seeded(seed)
    z = (3*torch.randn(n, c, generator=g)).requires_grad_()
    y = torch.stack([torch.randperm(c, generator=g)[:2] for _ in range(n)])
    t = bc_target(*y.T, torch.rand(n, generator=g), c)
    loss = bc_loss(z, t)
    torch.testing.assert_close(loss, F.kl_div(z.log_softmax(1), t, reduction='batchmean'))
    grads = [torch.autograd.grad(o, z)[0] for o in (loss, F.cross_entropy(z, t))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert loss >= -1e-6 and abs(bc_loss((t + 1e-30).log(), t)) < 1e-5

def test_loss_of_extreme_logits():
    z = t32([[1e4, -1e4], [-1e4, 1e4]]).requires_grad_()
    loss = bc_loss(z, t32([[.5, .5], [0., 1.]]))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# -- partners -------------------------------------------------------------------------------------
@quick
@given(st.lists(st.integers(-3, 5), min_size=1, max_size=20), st.integers(-3, 6), st.sampled_from([torch.float64, torch.float32]))
def test_partners_against_brute_force(pool, anchor, dtype):
    "On a grid of u each candidate of another class comes equally often, and no other; gaps between classes, one class, any order"
    want = [i for i,k in enumerate(pool) if k != anchor]
    n = max(len(want), 1)*4
    u = (torch.arange(n, dtype=dtype) + .5)/n
    got = other_class(torch.full((n,), anchor), torch.tensor(pool), u)
    if want: assert sorted(got.tolist()) == sorted(want*4)
    else: assert got.tolist() == [-1]*n

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('n', [3, 2**18 + 1])
def test_partners_at_the_ends(n, dtype):
    "0 is the first of the others, the largest number below 1 the last: never beyond"
    pool = torch.arange(n) >= n//3
    top = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    for anchor,(first,last) in enumerate(((n//3, n-1), (0, n//3-1))):
        for u,want in ((0*top, first), (top, last)):
            j = int(other_class(t32([anchor]), pool.long(), u))
            assert j == want

def test_partners_where_there_are_none():
    assert other_class(t32([], dtype=torch.int64), torch.arange(3), t64([])).tolist() == []
    assert other_class(t32([4, 5]), t32([4]), t64([.3, .3])).tolist() == [-1, 0]
    assert other_class(t32([4]), torch.arange(0), t64([.3])).tolist() == [-1]

def test_partners_do_not_wait_for_a_device():
    "On a device without numbers every step can be planned: nothing asks what is in a tensor"
    y, r = torch.empty(6, dtype=torch.int64, device='meta'), torch.empty(6, device='meta')
    assert other_class(y, y, r.double()).shape == (6,)
    x = torch.empty(6, 1, 4, 4, device='meta')
    for f in (bc_mix, bc_plus_mix, mix_waves): assert f(x, x, r).shape == x.shape
    assert bc_loss(torch.empty(6, 10, device='meta'), bc_target(y, y, r, 10)).shape == ()

@pytest.mark.parametrize('counts', [(1, 30, 3), (5, 5, 5)])
def test_partners_of_unbalanced_classes(counts):
    "Over a run: each image of another class is as likely as any other, however many its class has"
    pool = torch.cat([torch.full((n,), k) for k,n in enumerate(counts)])
    rng = np.random.RandomState(0)
    for k in range(3):
        j = other_class(torch.full((20000,), k), pool, torch.from_numpy(rng.rand(20000)))
        hits = j.bincount(minlength=len(pool))
        want = 20000/(len(pool) - counts[k])
        assert not hits[pool == k].any() and (hits[pool != k] - want).abs().max() < 5*want**.5


# -- normalisation and crop -----------------------------------------------------------------------
@pytest.mark.parametrize('plus', [False, True])
@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('kind', ['bytes', 'floats', 'chunks'])
def test_fit_against_numpy(plus, c, kind):
    x = images(1030 if kind == 'chunks' else 9, c, 5, 3)   # 1024 images are read at a time
    if kind == 'floats': x = x/255
    n = BCNorm.fit(x, plus)
    a = x.numpy().astype(np.float64)/(1 if kind == 'floats' else 255)
    if plus: a = a - a.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(n.mean.flatten(), a.mean((0, 2, 3)), atol=1e-7)
    np.testing.assert_allclose(n.std.flatten(), a.std((0, 2, 3)), rtol=1e-6)
    out = n(x)
    assert out.dtype == torch.float32 and n.plus == plus
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 2, 3), correction=0), 1, atol=1e-5)

def test_fit_of_a_channel_that_never_changes():
    "Refused, whatever the constant: rounding must not become a standard deviation"
    for i in range(40):
        x = torch.rand(7+i, 2, 5, 3, generator=seeded(i))
        x[:, 1] = .0247*i
        with pytest.raises(ValueError, match='std'): BCNorm.fit(x)
    with pytest.raises(ValueError, match='std'): BCNorm.fit(images(c=1, kind='flat'), True)   # each image of one colour
    x = images(50, 1, 8, 8, kind='flat')*0
    x[0, 0, 0, 0] = 1
    assert (BCNorm.fit(x).std > 0).all()   # one pixel by one step is a change

def test_norm_refuses_and_is_a_layer():
    for kw in (dict(mean=(.5, .5), std=(.5,)), dict(mean=.5, std=0.), dict(mean=.5, std=nan), dict(mean=(0, 0), std=(1, -1))):
        with pytest.raises(ValueError, match='std'): BCNorm(**kw)
    n = BCNorm(.5, .25, True)
    with pytest.raises(ValueError, match='3 channel'): n(torch.rand(2, 3, 4, 4))
    assert differences(dict(n.state_dict()), dict(pickle.loads(pickle.dumps(n)).state_dict())) == [] and not list(n.parameters())
    x = torch.rand(4, 1, 3, 3)
    np.testing.assert_allclose(zero_mean(x).mean((1, 2, 3)), 0, atol=1e-7)
    assert torch.equal(n(x), n(x, seeded())) and not torch.allclose(n(x), n(x[:1]).expand(4, -1, -1, -1))

@quick
@given(st.integers(0, 10**6), sizes, sizes, sizes, st.integers(0, 5))
def test_crop_against_a_loop(seed, b, h, w, pad):
    g = seeded(seed)
    x = torch.randn(b, 2, h, w, generator=g)
    dy, dx = torch.randint(2*pad + 1, (2, b), generator=g)
    out = zero_crop(x, dy, dx, pad)
    for i in range(b):
        for r in range(h):
            for s in range(w):
                a, o = r + int(dy[i]) - pad, s + int(dx[i]) - pad
                want = x[i, :, a, o] if 0 <= a < h and 0 <= o < w else torch.zeros(2)
                assert out[i, :, r, s].tolist() == want.tolist()

def test_crop_as_an_augmentation():
    "All offsets come, each image has its own, the same from the same generator; bytes stay bytes"
    x, crop = torch.randn(400, 1, 6, 6), ZeroCrop(2)
    assert torch.equal(crop(x, seeded(1)), crop(x, seeded(1))) and not torch.equal(crop(x, seeded(1)), crop(x, seeded(2)))
    dy, dx = crop.params(400, 1, 6, 6, seeded())
    assert (dy*5 + dx).unique().tolist() == list(range(25))
    assert torch.equal(ZeroCrop(0)(x), x) and crop(images()).dtype == torch.uint8
    for pad in (-1, .5):
        with pytest.raises(ValueError, match='pad='): ZeroCrop(pad)

def test_loaders_normalise_first():
    "The border is the zero of normalised images, not black; validation and new images are normalised alike, also beside a stream"
    for steps in (None, 4):
        dls = small_dls(steps=steps)
        x = dls.train.one_batch()[0]
        norm = dls.valid.augment
        black = float(norm(torch.zeros(1, 1, 8, 8)).min())
        assert (x == 0).any() and float(x.min()) < 0 and math.isclose(float(x.min()), black, rel_tol=1e-5)
        want = norm(DIGITS.test.x[:5])
        assert torch.equal(torch.as_tensor(dls.test_dl(DIGITS.test.x[:5]).one_batch()[0]), want)
        learn, seen = learner([], dls, linear), []
        with learn.no_bar(): learn.get_preds(ds_idx=0, cbs=Every('before_batch', lambda o: seen.append(float(o.xb[0].min())), valid=True))
        assert min(seen) < 0   # the training images once through

def test_loaders_of_bc_plus():
    dls = small_dls(plus=True, augment=())
    x = dls.train.one_batch()[0]
    assert dls.valid.augment.plus and (x < 0).any()
    own = BCNorm(.5, .5)
    assert small_dls(norm=own).valid.augment is own


# -- optimiser and schedule -----------------------------------------------------------------------
@pytest.mark.parametrize('grads, want', [((1, 1, 1), (-.271, -.6149, -1.02441)), ((1, -1, .5), (-.271, -.0729, -.20111)), ((1, 0, 0, 0), (-.271, -.3439, -.40951, -.468559))])
def test_nesterov_by_hand(grads, want):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = chainer_nesterov([p], lr=.1, mom=.9, wd=0)
    for g,w in zip(grads, want):
        p.grad = t64([g])
        opt.step()
        assert math.isclose(p.detach(), w, abs_tol=1e-12)

@quick
@given(st.integers(0, 10**6), st.floats(0, .99), st.floats(0, .1), st.lists(st.floats(1e-4, 1), min_size=1, max_size=6))
def test_nesterov_against_a_loop(seed, mom, wd, lrs):
    "With rates that change and decay; the decay belongs to the gradient"
    g = seeded(seed)
    w = torch.randn(3, generator=g, dtype=torch.float64)
    p, v = nn.Parameter(w.clone()), torch.zeros(3, dtype=torch.float64)
    opt = chainer_nesterov([p], mom=mom, wd=wd)
    for lr in lrs:
        grad = torch.randn(3, generator=g, dtype=torch.float64)
        p.grad = grad.clone()
        opt.set_hyper('lr', lr)
        opt.step()
        d = grad + wd*w
        v = mom*v - lr*d
        w = w + mom**2*v - (1 + mom)*lr*d
        torch.testing.assert_close(p.detach(), w)

@pytest.mark.parametrize('everywhere', [True, False])
def test_decay_of_all_or_of_kernels(everywhere):
    "On all parameters only with `wd_bn_bias=True`"
    dls = digits_dls(steps=1)
    one, other = (learner([], dls, opt_func=partial(chainer_nesterov, wd=wd), wd_bn_bias=everywhere) for wd in (0., .5))
    before = parameters(one)
    for l in (one, other):
        l.create_opt()
        for p in l.model.parameters(): p.grad = torch.zeros_like(p)
        l.opt.set_hyper('lr', .1)
        l.opt.step()
    assert differences(before, parameters(one)) == []
    for k,v in parameters(other).items():
        kernel = k.endswith('weight') and not k.startswith('1.')   # the second module is BatchNorm
        if everywhere or kernel: torch.testing.assert_close(v, before[k]*(1 - .1*1.9*.5 - .81*.1*.5))
        else: assert torch.equal(v, before[k])

@pytest.mark.parametrize('epochs, steps, kw, want', [
    (10, 3, {}, [1]*4 + [.1]*2 + [.01]*2 + [.001]*2), (5, 7, dict(warmup=.2, factor=.2), [.1, 1, .2, .04, .008]), (3, 2, dict(at=()), [1]*3),
    (7, 11, dict(at=(3/7, 6/7)), [1]*3 + [.1]*3 + [.01]), (6, 1, dict(at=(.5, .75), warmup=1/6), [.1, 1, 1, .1, .1, .01])], ids=str)
def test_schedule_at_the_borders_of_epochs(epochs, steps, kw, want):
    "The first batch of an epoch already has the new rate, the last one still the old; all groups of parameters follow"
    learn, seen = learner([], digits_dls(steps=steps), linear, opt_func=chainer_nesterov, splitter=lambda m: [[p] for p in m.parameters()]), []
    quiet_fit(learn, epochs, cbs=[step_schedule(1., **kw), Every('before_step', lambda o: seen.append((o.epoch, [h['lr'] for h in o.opt.hypers])))])
    assert len(seen) == epochs*steps
    for e,lrs in seen: np.testing.assert_allclose(lrs, [want[e]]*2, rtol=1e-9)


# -- one step -------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(), dict(plus=True), dict(pairs='batch'), dict(pairs='batch', fold=True, alpha=.3), dict(batch_size=24), dict(pairs='batch', batch_size=24, plus=True)], ids=str)
def test_a_step_by_hand(kw):
    "Ratios and partners from generators of one's own; anchors in the loader's order, each as often as asked; classes differ; KL and its gradient"
    cb, seen, n = BC(seed=3, **kw), [], kw.get('batch_size', 8)
    dls = small_dls(augment=())
    data, norm, rng = dls.train.dataset, dls.valid.augment, np.random.RandomState(3)
    every, mix = norm(data.x), cb.mix
    def position(x): return int((every - x).abs().sum((1, 2, 3)).argmin())
    given_ = []
    def look(x1, x2, r):
        cb.inside = x1, x2, r
        return mix(x1, x2, r)
    cb.mix = look
    def check(o):
        x1, x2, r = cb.inside
        want = rng.beta(kw.get('alpha', 1.), kw.get('alpha', 1.), n)
        np.testing.assert_allclose(r, np.maximum(want, 1-want) if kw.get('fold') else want, rtol=1e-6)
        x, y = given_[-1]
        assert torch.equal(x1, x.repeat(n//8, 1, 1, 1))
        y1 = y.repeat(n//8)
        pool, px = (y, x) if kw.get('pairs') == 'batch' else (data.y, every)
        j = other_class(y1, pool, torch.from_numpy(rng.rand(n)))
        assert torch.allclose(px[j], x2, atol=1e-5) and (pool[j] != y1).all()
        f = bc_plus_mix if kw.get('plus') else bc_mix
        assert torch.equal(o.xb[0], f(x1, x2, r))
        t = F.one_hot(y1, 10)*r[:, None] + F.one_hot(pool[j], 10)*(1 - r)[:, None]
        torch.testing.assert_close(cb.t, t)
        assert torch.equal(o.yb[0], t.argmax(1)) and len(o.pred) == n
        z = learn.model(o.xb[0])
        loss = F.kl_div(z.log_softmax(1), t, reduction='batchmean')
        torch.testing.assert_close(torch.as_tensor(o.learn.loss), loss.detach())
        cb.grads = torch.autograd.grad(loss, list(learn.model.parameters()))
        seen.append(loss)
    def grads(o):
        for p,g in zip(learn.model.parameters(), cb.grads): torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)
    first = Every('before_batch', lambda o: given_.append([torch.as_tensor(v[0]).as_subclass(torch.Tensor) for v in (o.xb, o.yb)]))
    first.order = cb.order - 1
    learn = learner([cb, first], dls, linear)
    quiet_fit(learn, 1, 1e-2, cbs=[Every('after_loss', check), Every('before_step', grads)])
    assert len(seen) == 5 == cb.n_step

@pytest.mark.parametrize('where', ['0', '1', '2', '4', '5', '6'])
@pytest.mark.parametrize('kw', [dict(), dict(plus=True, pairs='batch', batch_size=16)], ids=str)
def test_a_step_inside(where, kw):
    "Both images through the lower layers as one batch, then the mixture alone: logits and running statistics"
    cb, seen = BC(where=where, **kw), []
    def keep(x1, x2, r):
        cb.r = r
        return (bc_plus_mix if cb.plus else bc_mix)(x1, x2, r)
    cb.mix = keep
    def check(o):
        n, at = kw.get('batch_size', 8), int(where) + 1
        assert len(o.xb[0]) == 2*n
        net = cb.twin
        z = net[at:](keep(*net[:at](o.xb[0]).chunk(2), cb.r))
        torch.testing.assert_close(o.pred, z)
        for a,b in zip(net.buffers(), learn.model.buffers()): torch.testing.assert_close(a, b)
        seen.append(1)
    def make_twin(o):
        cb.twin = tiny_net()
        cb.twin.load_state_dict(learn.model.state_dict())
    learn = learner([cb], small_dls(plus=True))
    quiet_fit(learn, 1, 1e-2, cbs=[Every('before_batch', make_twin), Every('after_pred', check)])
    assert len(seen) == 5 and not [m for m in learn.model.modules() if m._forward_hooks]

def test_a_module_called_twice():
    "The first call is mixed, the second is left alone"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.net = nn.Identity(), tiny_net()
        def forward(self, x): return self.net(self.same(self.same(x)))
    a = quiet_fit(learner([BC(where='same')], model=Net), 1, 1e-2)
    b = quiet_fit(learner([BC(where='net.1')], model=Net), 1, 1e-2)
    c = quiet_fit(learner([BC()], model=Net), 1, 1e-2)
    assert [float(o) for o in a.recorder.losses] == [float(o) for o in c.recorder.losses] != [float(o) for o in b.recorder.losses]

def test_views_of_partners():
    "A partner is augmented on its own: a second view of its image, drawn by the callback"
    dls, seen = small_dls(), []
    cb = BC()
    views = cb._views
    def look(j):
        at = dls.train.generator.get_state()
        out = views(j)
        assert torch.equal(at, dls.train.generator.get_state()) and len(out) == len(j)
        seen.append(out)
        return out
    cb._views = look
    quiet_fit(learner([cb], dls, linear), 1)
    assert len(seen) == 5 and all((o == 0).any() for o in seen)   # the crop's zeros

def test_smaller_last_batch():
    rows = []
    quiet_fit(learner([BC(batch_size=24)], small_dls(bs=12), linear), 1, cbs=Every('after_pred', lambda o: rows.append(len(o.pred))))
    assert rows == [24, 24, 24, 8]

def test_validation_is_plain():
    "No mixture, cross-entropy, accuracy of plain images; hooks and loss function as before"
    cb, seen = BC(where='2'), []
    learn = learner([cb], small_dls())
    loss = learn.loss_func
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: seen.append(len(o.pred)) if not o.training else None, valid=True))
    assert seen == [40] and learn.loss_func is loss
    state = cb.state_dict()
    with learn.no_bar():
        got = learn.validate()
        z, y = learn.get_preds()
    assert math.isclose(got[0], F.nll_loss(torch.as_tensor(z).log(), torch.as_tensor(y)), rel_tol=1e-4) and differences(state, cb.state_dict()) == []


# -- seeds and resume -----------------------------------------------------------------------------
MODES = [dict(), dict(plus=True), dict(pairs='batch', batch_size=16), dict(where='2'), dict(where='2', plus=True, pairs='batch', fold=True, alpha=.5)]
modes = pytest.mark.parametrize('kw', MODES, ids=str)

@modes
def test_seeds(kw):
    "The same seed is the same run; another one is another, in every draw"
    a, b, c = (quiet_fit(learner([BC(seed=s, **kw)], small_dls()), 1, 1e-2) for s in (0, 0, 1))
    assert differences(outcome(a), outcome(b)) == []
    assert differences(outcome(a)[0], outcome(c)[0])

@pytest.mark.parametrize('other', [dict(plus=True), dict(pairs='batch'), dict(where='2'), dict(alpha=.2), dict(fold=True), dict(batch_size=16), dict(seed=1)], ids=str)
def test_every_argument_matters(other):
    ends = [parameters(quiet_fit(learner([BC(**kw)], small_dls()), 1, 3e-2)) for kw in (dict(), other)]
    assert differences(*ends)

class Shaky(Items):
    "Every look at an image draws from torch's, NumPy's and Python's global generators."
    @property
    def targets(self): return self.y
    def __getitem__(self, i): return self.x[i] + .1*torch.rand(1) + .1*np.random.rand() + .1*random.random(), self.y[i]

def picture(i): return PILImageBW.create(DIGITS.train.x[i, 0].numpy())
def block_dls(**kw):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]), splitter=IndexSplitter(range(30, 40)),
                      batch_tfms=[RandomErasing(p=.9, sh=.3), Normalize.from_stats([.3], [.4], cuda=False)])
    return block.dataloaders(list(range(40)), bs=8, num_workers=0, device='cpu', **kw)

LOADERS = dict(one_pass=partial(small_dls, bs=16), stream=partial(small_dls, steps=4), block=block_dls, shaky=lambda: own_dls(Shaky()), get_dls=digits_dls)

def whole_run(dls, folder, kw, cbs=(), more=(), every=2, **args):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)   # fastai's loaders draw their own seed
    learn = learner([BC(**kw), Checkpoint(folder, every=every, keep=2), *more], LOADERS[dls](), **{**dict(opt_func=chainer_nesterov), **args})
    return quiet_fit(learn, 2, 1e-2, cbs=[step_schedule(1e-2, at=(.5,)), *cbs])

# One pass has three batches (the last is smaller), a stream four, fastai's own loaders three and five; files after 2, 4, 6 ... of them
RUNS = [('one_pass', MODES[0], 'before_batch', 3), ('one_pass', MODES[2], 'after_step', 5), ('one_pass', MODES[3], 'after_pred', 4), ('stream', MODES[4], 'before_batch', 6),
        ('stream', MODES[1], 'after_batch', 4), ('block', MODES[0], 'before_batch', 5), ('block', MODES[3], 'after_loss', 3), ('shaky', MODES[0], 'before_batch', 4),
        ('shaky', MODES[2], 'after_step', 7), ('get_dls', MODES[0], 'after_step', 6)]

@pytest.mark.parametrize('dls, every', [('one_pass', 3), ('block', 3), ('shaky', 5), ('stream', 4)])
def test_resumed_where_an_epoch_ends(dls, every, tmp_path):
    "The file was written after the last batch: the next epoch is not the same one again"
    def stop(o):
        if o.train_iter == every + 1: raise RuntimeError('here')
    expected = whole_run(dls, tmp_path/'a', {}, every=every)
    with pytest.raises(RuntimeError): whole_run(dls, tmp_path/'b', {}, [Every('after_batch', stop)], every=every)
    got = whole_run(dls, tmp_path/'b', {}, every=every)
    assert differences(*(read_checkpoint(o.checkpoint.files()[-1]) for o in (expected, got))) == []

@linux
@pytest.mark.parametrize('dls, kw, event, n', RUNS, ids=str)
def test_killed_and_resumed(dls, kw, event, n, tmp_path):
    expected = read_checkpoint(whole_run(dls, tmp_path/'a', kw).checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        if not cb.training: return
        count[0] += 1
        if count[0] == n: die()
    assert in_child(lambda: whole_run(dls, tmp_path/'b', kw, [Every(event, kill)])) == signal.SIGKILL
    assert list((tmp_path/'b').glob('step*'))
    got = read_checkpoint(whole_run(dls, tmp_path/'b', kw).checkpoint.files()[-1])
    assert differences(expected, got) == []

def test_resume_with_teacher_and_accumulation(tmp_path):
    def run(folder, *cbs): return whole_run('one_pass', folder, dict(where='2', batch_size=32), cbs, (EMATeacher(.5), GradientAccumulation(48)))
    def stop(o):
        if o.training and o.train_iter == 4: raise RuntimeError('here')
    expected = run(tmp_path/'a')
    with pytest.raises(RuntimeError): run(tmp_path/'b', Every('after_batch', stop))
    got = run(tmp_path/'b')
    assert differences(outcome(expected), outcome(got)) == [] and got.ema_teacher.n_updates == expected.ema_teacher.n_updates > 1
    assert 'velocity' in got.opt.state_dict()['state'][0]

def test_what_a_checkpoint_holds(tmp_path):
    learn = whole_run('one_pass', tmp_path, {})
    own = read_checkpoint(learn.checkpoint.files()[-1])['cbs']['bc_learning']
    assert own['n_step'] == 6 and torch.equal(own['generator'], learn.bc_learning.generator.get_state())


# -- with the rest of fastai ----------------------------------------------------------------------
@modes
@pytest.mark.parametrize('trained', [False, True])
def test_looking_leaves_no_trace(kw, trained):
    "`lr_find`, `validate` and `get_preds`: the fit after them is the fit that would have been"
    a, b = (learner([BC(**kw)], small_dls(steps=4)) for _ in range(2))
    if trained:
        for l in (a, b): quiet_fit(l, 1, 1e-2)
    at, torch_state = b.dls.train.state_dict(), torch.get_rng_state()
    with b.no_bar():
        b.lr_find(num_it=6, show_plot=False)
        b.validate()
        b.get_preds()
    b.dls.train.load_state_dict(at)   # the order of images is the loader's own business
    torch.set_rng_state(torch_state)
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    assert differences(outcome(a)[:3], outcome(b)[:3]) == []

def test_interrupted_lr_find():
    "Ctrl-C in `lr_find`, then a fit: nothing comes back at its end"
    cb = BC()
    learn = learner([cb])
    def stop(o):
        if o.train_iter == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(Every('after_batch', stop)): learn.lr_find(show_plot=False)
    start = cb.state_dict()
    quiet_fit(learn, 2)
    assert cb.n_step >= 8 and differences(start['rng'], cb.state_dict()['rng'])

class Gate(nn.Module):
    "Stops the forward before the layers that follow."
    shut = False
    def forward(self, x):
        if self.shut: raise KeyboardInterrupt
        return x

def test_interrupted_forward():
    "Ctrl-C before the place of mixing: no later forward is mixed"
    def gated(): return nn.Sequential(Gate(), *tiny_net())
    cb = BC(where='3')
    learn = learner([cb], model=gated)
    def shut(o): learn.model[0].shut = o.train_iter == 2
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1, 1e-2, cbs=Every('before_batch', shut))
    learn.model[0].shut = False
    twin = gated()
    twin.load_state_dict(learn.model.state_dict())
    x = torch.rand(16, 1, 8, 8)
    assert torch.equal(learn.model.eval()(x), twin.eval()(x))
    with learn.no_bar(): learn.validate()
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, Every)])
    quiet_fit(learn, 1, 1e-2, cbs=EMATeacher(.9))
    assert not [m for m in learn.model.modules() if m._forward_hooks or m._forward_pre_hooks] and np.isfinite(learn.recorder.losses).all()

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
@pytest.mark.parametrize('where', ['input', '2'])
def test_no_trace_after_cancel(event, where):
    learn = learner([])
    model, loss, n = learn.model, learn.loss_func, len(learn.cbs)
    def stop(o):
        if o.train_iter >= 2: raise CancelFitException
    quiet_fit(learn, 1, 1e-2, cbs=[cb := BC(where=where), Every(event, stop, valid=True)])
    assert len(learn.cbs) == n and learn.model is model and learn.loss_func is loss
    assert not [m for m in model.modules() if m._forward_hooks] and not {'t', 'pool', 'module'} & vars(cb).keys()
    step = cb.n_step
    quiet_fit(learn, 1, 1e-2, cbs=cb)
    assert cb.n_step == step + 4

def test_a_second_fit_goes_on_also_with_other_loaders():
    learn = quiet_fit(learner([cb := BC()], small_dls(), linear), 1, 1e-2)
    a = cb.state_dict()
    learn.dls = digits_dls(n=20, steps=3)   # other images: their labels, not the old ones
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: cb.__dict__.update(was=len(cb.pool))))
    assert cb.was == 20 and cb.n_step == 8 and differences(a['rng'], cb.state_dict()['rng'])

@pytest.mark.parametrize('kw', [dict(), dict(where='2')], ids=str)
def test_export_copy_pickle(kw, tmp_path):
    learn = quiet_fit(learner([BC(**kw)], small_dls(), path=tmp_path), 1, 1e-2)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    x = DIGITS.test.x[:20]
    with learn.no_bar(), again.no_bar(): was, now = (l.get_preds(dl=l.dls.test_dl(x))[0] for l in (learn, again))
    assert torch.equal(was, now) and (tmp_path/'a.pkl').stat().st_size < 300_000
    learn.remove_cb(cb := learn.bc_learning)
    for twin in (deepcopy(cb), pickle.loads(pickle.dumps(cb))):
        assert differences(cb.state_dict(), twin.state_dict()) == []
        assert torch.equal(twin.draw_ratio(5), deepcopy(cb).draw_ratio(5))

def test_teacher_beside_it():
    "The mean of students, without hooks; it answers in validation"
    learn = quiet_fit(learner([BC(where='2'), EMATeacher(.5)], small_dls()), 2, 1e-2)
    teacher = learn.ema_teacher.teacher
    assert not [m for m in teacher.modules() if m._forward_hooks] and learn.ema_teacher.n_updates == 10
    with learn.no_bar(): z = learn.get_preds()[0]
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(z), teacher(x).softmax(1))

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('kw', [dict(), dict(where='0', plus=True)], ids=str)
def test_mixed_precision_and_channels_last(kw):
    "The forward in bf16, labels and loss in fp32"
    seen, more = [], [MixedPrecision(AMPMode.BF16), ChannelsLast()]
    learn = learner([cb := BC(**kw), *more], small_dls(), opt_func=partial(SGD, mom=.9))
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: seen.extend([cb.t.dtype, o.learn.loss.dtype, o.learn.loss_grad.dtype])))
    assert {torch.float32} == set(seen) and np.isfinite(learn.recorder.losses).all()

def test_accumulated_gradients():
    "Two batches of 8 are one of 16: with a linear network, where batches do not matter, the same sum"
    n = [0]
    learn = learner([BC(), GradientAccumulation(16)], small_dls(steps=4), linear, opt_func=SGD)
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_step', lambda o: n.__setitem__(0, n[0] + 1)))
    assert n == [2] and learn.bc_learning.n_step == 4

def test_train_metrics():
    "The accuracy of training asks for the larger part"
    learn, right = learner([BC()], small_dls(), linear), []
    learn.recorder.train_metrics = True
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: right.append((o.pred.argmax(1) == o.cbs[0].learn.bc_learning.t.argmax(1)).float().mean().item())))
    assert learn.recorder.metric_names[1:5] == ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']
    assert math.isclose(learn.recorder.values[-1][1], np.mean(right), rel_tol=1e-5)

@pytest.mark.parametrize('where', ['input', '0'])
def test_pretrained_networks_and_normalize(where):
    "A `DataBlock`, a `vision_learner`: what the learner adds to the loaders reaches the partners, too"
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1)),
                      get_y=lambda i: int(DIGITS.train.y[i]), splitter=IndexSplitter(range(16, 24)), item_tfms=Resize(32))
    dls = block.dataloaders(list(range(24)), bs=8, num_workers=0, device='cpu')
    learn, seen = vision_learner(dls, resnet18, pretrained=False, normalize=False, cbs=BC(plus=True, where=where)), []
    dls.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=False)], 'after_batch')
    mix = learn.bc_learning.mix
    def look(x1, x2, r):
        seen.append([float(o.min()) for o in (x1, x2)])
        return mix(x1, x2, r)
    learn.bc_learning.mix = look
    quiet_fit(learn, 1, 1e-3)
    assert len(seen) == 2 and np.isfinite(learn.recorder.losses).all()
    if where == 'input': assert np.allclose(seen, -2.1179, atol=1e-3)   # black, normalised

@pytest.mark.parametrize('kw', [dict(), dict(where='2')], ids=str)
def test_compiled_model(kw):
    "The same run, also when the network was compiled by an earlier call"
    a, b = (learner([BC(**kw)]) for _ in range(2))
    b.model = torch.compile(b.model, backend='eager')
    with b.no_bar(): b.validate()
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    np.testing.assert_allclose([float(o) for o in a.recorder.losses], [float(o) for o in b.recorder.losses], rtol=1e-4)


# -- labels of the training set -------------------------------------------------------------------
class Listed(Items):
    "A data set as torchvision's: images one by one, labels in a list, too."
    def __init__(self, targets=lambda y: y.tolist(), **kw):
        super().__init__(**kw)
        self.targets, self.labels = targets(self.y), self.y
        del self.y
    def __getitem__(self, i): return self.x[i], self.labels[i]

@pytest.mark.parametrize('kind', [list, np.asarray, lambda y: y, lambda y: y.to(torch.uint8), lambda y: np.asarray(y).astype(np.int32)], ids=['list', 'numpy', 'torch', 'uint8', 'int32'])
def test_lists_of_labels(kind):
    data = Listed(kind)
    y = training_labels(data)
    assert y.dtype == torch.int64 and torch.equal(y, data.labels)
    quiet_fit(learner([BC()], own_dls(data)), 1)

def test_labels_of_a_datablock():
    "Without a look at the images"
    dls = block_dls()
    want = [int(dls.vocab.o2i[int(DIGITS.train.y[i])]) for i in range(30)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr('test_bc_learning.picture', None, raising=False)
        assert training_labels(dls.train.dataset).tolist() == want

class NoList:
    def __init__(self): self.items = Items()
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def test_no_list_of_labels():
    for data,name in ((NoList(), 'NoList'), (Subset(Items(), range(3, 30)), 'Subset')):
        refused(learner([BC()], own_dls(data)), f'a {name} has no list of its labels', "pairs='batch'")
        quiet_fit(learner([BC(pairs='batch')], own_dls(data)), 1)

@pytest.mark.parametrize('targets, words', [(lambda y: [str(int(o)) for o in y], ('label',)), (lambda y: F.one_hot(y), ('label',)), (lambda y: y[:20], ('label', '40 images')),
                                            (lambda y: y.float() + .5, ('label',))], ids=['names', 'rows', 'short', 'floats'])
def test_lists_that_are_none(targets, words): refused(learner([BC()], own_dls(Listed(targets))), *words)

def test_more_than_one_class_for_an_image():
    block = DataBlock((ImageBlock(PILImageBW), MultiCategoryBlock), get_x=picture, get_y=lambda i: [str(int(DIGITS.train.y[i]))], splitter=IndexSplitter(range(30, 40)))
    learn = learner([BC()], block.dataloaders(list(range(40)), bs=8, num_workers=0, device='cpu'), loss_func=nn.BCEWithLogitsLoss(), metrics=[])
    refused(learn, 'label')


# -- bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(pairs='all'), dict(pairs=None), dict(alpha=0), dict(alpha=-1.), dict(alpha=nan), dict(alpha=inf), dict(batch_size=0), dict(batch_size=-8), dict(batch_size=16.)], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError) as e: BC(**kw)
    assert str(e.value).startswith(f'{name}: got') and str(value) in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('size', [4, 12])
def test_batch_size_is_a_multiple(size): refused(learner([BC(batch_size=size)]), f'batch_size: got {size}', 'bs=8')

@pytest.mark.parametrize('where', ['norm', '', '7', 'block1.'])
def test_place_that_is_not_there(where): refused(learner([BC(where=where)]), f'where: got {where!r}', "expected 'input' or one of 0, 1, 2")

class Parts(nn.Module):
    "Modules that a batch goes past, gets other rows from, or a tuple."
    def __init__(self):
        super().__init__()
        self.net, self.idle, self.rows, self.pair, self.w = tiny_net(), nn.Identity(), nn.Identity(), Pair(), nn.Parameter(torch.ones(3, 2))
    def forward(self, x):
        self.rows(self.w)
        return self.net(self.pair(x)[0])
class Pair(nn.Module):
    def forward(self, x): return x, x

@pytest.mark.parametrize('where, words', [('idle', ('where: the model did not call idle',)), ('rows', ('where: rows gives 3 rows for 16 images',)), ('pair', ('where: pair gives', 'tuple'))])
def test_place_that_cannot_be_mixed(where, words):
    refused(learn := learner([BC(where=where)], model=Parts), *words)
    quiet_fit(learn, 0)
    with learn.no_bar(): learn.validate()

def test_frozen_place():
    "A module that stays in evaluation mode while the rest trains is mixed all the same"
    learn = learner([BC(where='1')])
    quiet_fit(learn, 1, 1e-2, cbs=Every('before_train', lambda o: learn.model[1].eval()))
    assert learn.bc_learning.n_step == 4 and learn.model[1].num_batches_tracked == 0

def test_models():
    refused(learner([BC()], model=partial(tiny_net, 9)), 'model: it gives', '8, 9', '8, 10')
    refused(learner([BC(where='6')], model=lambda: nn.Sequential(*tiny_net(), nn.Unflatten(1, (5, 2)))), 'model: it gives', '8, 5, 2')
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()
        def forward(self, x): return self.net(x), x
    refused(learner([BC()], model=Both, loss_func=lambda p, y: F.cross_entropy(p[0], y), metrics=[]), 'model: it gives', 'tuple')

@pytest.mark.parametrize('other', [MixUp, CutMix, PaperMixUp, partial(BC, seed=1)], ids=['mixup', 'cutmix', 'paper', 'itself'])
def test_two_that_mix(other): refused(learner([BC(), other()]), 'cbs', 'mix')

def test_images():
    dls = own_dls()
    dls.train.dataset.x[:, 0, 3, 3] = nan
    refused(learner([BC()], dls), 'step 0: the images are not finite', error=FloatingPointError)
    refused(learner([BC(plus=True)]), 'plus: the images have no negative values')
    refused(learner([BC()], own_dls(dtype=torch.uint8)), 'uint8', error=TypeError)   # not a mixture of bytes
    class TwoImages(Items):
        def __getitem__(self, i): return self.x[i], self.x[i], self.y[i]
    refused(learner([BC()], own_dls(TwoImages())), 'dls.train: got 2 inputs and 1 targets')
    learn = quiet_fit(learner([BC(plus=True, where='0')]), 1)   # inside, waves come by themselves
    assert np.isfinite(learn.recorder.losses).all()

def test_a_bad_partner():
    "Not one of the anchors: the loss says so before a step"
    dls = own_dls(bs=2)
    dls.train = loader(dls.train.dataset, 2, False)
    dls.train.dataset.x[20:] = nan
    seen, learn = [], learner([BC()], dls)
    with pytest.raises(FloatingPointError, match='the loss is not finite'): quiet_fit(learn, 1, cbs=Every('before_batch', lambda o: seen.append(o.train_iter)))
    assert seen and seen[-1] < 10 and all(p.isfinite().all() for p in learn.model.parameters())

def items_with(y):
    items = Items()
    items.y = y(items.y)
    return items

def test_labels():
    refused(learner([BC()], own_dls(items_with(torch.zeros_like))), 'all of its 40 images are of one class')
    refused(learner([BC(pairs='batch')], own_dls(items_with(torch.zeros_like))), 'a batch has images of one class only', "pairs='dataset'")
    refused(learner([BC()], own_dls(items_with(lambda y: torch.where(torch.arange(40) < 39, y, 12)))), 'label lies outside the 10 classes')
    refused(learner([BC()], own_dls(items_with(lambda y: torch.where(torch.arange(40) < 39, y, -1)))), 'label lies outside the 10 classes')
    for p in ('batch', 'dataset'): refused(learner([BC(pairs=p)], own_dls(items_with(lambda y: y + 5))), 'label lies outside the 10 classes')
    refused(learner([BC(pairs='batch')], own_dls(items_with(lambda y: F.one_hot(y).float()))), 'labels of shape (8, 10) and torch.float32')
    refused(learner([BC(pairs='batch')], own_dls(bs=1)), 'a batch has images of one class only')
    quiet_fit(learner([BC()], own_dls(bs=1)), 1)   # from the whole set there always is a partner
    dls = own_dls()
    del dls.c
    refused(learner([BC()], dls), 'dls: it does not say its number of classes')

def test_hidden_labels():
    dls = digits_dls(steps=3)
    dls.train = ImageDL(DIGITS.train.subset(slice(40)).hide_labels(), 8, True)
    for p in ('dataset', 'batch'): refused(learner([BC(pairs=p)], dls), 'dls.train:')
    dls = mixed_dls(DIGITS, 40, bs=8, steps=4, valid=40, device='cpu')   # the second entry is a position
    refused(learner([BC()], dls), 'dls.train:')

def test_bad_loss():
    def spoil(o):
        if cb.n_step == 2:
            with torch.no_grad(): learn.model[-1].bias.fill_(nan)
    learn = learner([cb := BC()])
    with pytest.raises(FloatingPointError, match='step 2: the loss is not finite'): quiet_fit(learn, 1, cbs=Every('before_batch', spoil))
