"Auxiliary Training: groups of BatchNorm against passes of their own, where a trunk ends, views, exact resume, bad input, fastai's other features."
import math, pickle, random, signal, warnings
from copy import deepcopy
from functools import partial
from itertools import permutations

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageEnhance
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper, ranger, SGD
from fastai.vision.augment import Flip, Resize
from fastai.vision.core import imagenet_stats, PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision import transforms
from torchvision.models import resnet18
from torchvision.transforms import v2

import ssl_notes.auxiliary_training as page
from ssl_notes.augment import Compose, RandomFlip, ZeroCrop
from ssl_notes.auxiliary_training import (add_bytes, auxiliary_loss, AuxiliaryHead, AuxiliaryNet, AuxiliaryTrainingCallback, ByteNoise, ColorJitter, find_parts,
                                          GaussianBlur, kl_distill, paper_views, plain_bn, RandomRotation, selective_batch_norm, selective_bn, SelectiveBatchNorm1d,
                                          SelectiveBatchNorm2d, SelectiveBatchNorm3d, SelectiveSyncBatchNorm, soft_ce, tie_penalty, TRAINING)
from ssl_notes.bc_learning import BCLearningCallback
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unwrap
from ssl_notes.corruptions import Corrupt
from ssl_notes.corruptions import gaussian_blur
from ssl_notes.mixmatch import MixMatchCallback
from ssl_notes.models import cifar_resnet18, conv10, conv11, conv13, n_params, small_cnn, wide_resnet

from helpers import (short, die, differences, DIGITS, digits_dls, Every, finite, gloo, images, in_child, Items, learner, linux, loader, own_dls,
                     parameters, quiet_fit, refused, seeded, tiny_net, two_processes, weights)

quick = settings(max_examples=25, deadline=None)
nan, inf = float('nan'), float('inf')
t64 = partial(torch.tensor, dtype=torch.float64)
sizes = st.integers(2, 5)

def dim(x): return .6*x
def aux(corruptions=None, stage2=.5, **kw): return AuxiliaryTrainingCallback([dim, ByteNoise()] if corruptions is None else corruptions, stage2=stage2, **kw)
def outcome(learn): return weights(learn), learn.auxiliary_training.state_dict(), learn.opt.state_dict(), [float(o) for o in learn.recorder.losses]
def buffers(m): return {k: v.clone() for k,v in m.named_buffers()}
def put_back(m, was):
    "Other tensors, so that graphs of earlier forwards keep theirs."
    for k,v in was.items():
        at, _, name = k.rpartition('.')
        m.get_submodule(at)._buffers[name] = v
def batchnorms(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]

def untouched(learn, model):
    "As if the callback had never been there: network, classes, hooks, optimiser."
    assert learn.model is model and not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [m for m in model.modules() if type(m).__name__.startswith('Selective') or 'sizes' in vars(m)]
    assert {id(p) for g in learn.opt.param_lists for p in g} == {id(p) for p in model.parameters()}


# -- selective BatchNorm --------------------------------------------------------------------------
KINDS = dict(flat=(nn.BatchNorm1d, ()), seq=(nn.BatchNorm1d, (3,)), d2=(nn.BatchNorm2d, (3, 2)), d3=(nn.BatchNorm3d, (2, 1, 2)), sync=(nn.SyncBatchNorm, (2, 2)))
kinds = pytest.mark.parametrize('kind', KINDS)

@kinds
@quick
@given(st.lists(st.one_of(st.just(0), sizes), min_size=1, max_size=4).filter(any), st.sampled_from([None, 0., .1, 1.]), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_groups_against_passes_of_their_own(kind, groups, momentum, affine, track, clean_only, seed):
    "Two steps: outputs, gradients, running statistics and the count of batches; groups of unequal sizes, empty ones, also an empty clean one"
    cls, shape = KINDS[kind]
    g = seeded(seed)
    own = cls(2, momentum=momentum, affine=affine, track_running_stats=track).double()
    if affine: nn.init.normal_(own.weight, generator=g)
    many = selective_bn(deepcopy(own))
    many.sizes, many.clean_only = tuple(groups), clean_only
    for _ in range(2):
        x = (1 + torch.randn(sum(groups), 2, *shape, generator=g, dtype=torch.float64)).requires_grad_()
        out, w = many(x), torch.randn(sum(groups), 2, *shape, generator=g, dtype=torch.float64)
        want = []
        for i,rows in enumerate(x.split(groups)):
            was = buffers(own)
            if len(rows): want.append(own(rows))
            if i and clean_only: put_back(own, was)
        torch.testing.assert_close(out, torch.cat(want))
        grads = [torch.autograd.grad((o*w).sum(), [x, *m.parameters()]) for o,m in ((out, many), (torch.cat(want), own))]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(buffers(many), buffers(own))
    assert differences(weights(many), weights(own), skip=('running_mean', 'running_var')) == []

@kinds
def test_without_groups_and_in_evaluation(kind):
    "An ordinary layer: bit for bit"
    cls, shape = KINDS[kind]
    x = torch.randn(7, 2, *shape, generator=seeded())
    for track in (True, False):
        own = cls(2, track_running_stats=track)
        many = selective_bn(deepcopy(own))
        assert torch.equal(many(x), own(x)) and differences(buffers(many), buffers(own)) == []
        many.sizes = 3, 4
        assert torch.equal(many.eval()(x), own.eval()(x)) and torch.equal(many(x[:2]), own(x[:2]))

@pytest.mark.parametrize('groups', [(2, 2, 2), (0, 6), (6,), (1, 5), (2, 0, 4)], ids=str)
def test_function_and_layer(groups):
    x = torch.randn(6, 3, 4, 4, generator=seeded())
    m = SelectiveBatchNorm2d(3, momentum=.3)
    mean, var = m.running_mean.clone(), m.running_var.clone()
    m.sizes = groups
    out = selective_batch_norm(x, groups, mean, var, m.weight, m.bias, .3)
    torch.testing.assert_close(m(x), out)
    torch.testing.assert_close((mean, var), (m.running_mean, m.running_var))
    if not groups[0]: assert not mean.any() and (var == 1).all()   # nothing clean: nothing moves

def test_by_hand():
    "Two steps on numbers; a layer in 2d"
    m = SelectiveBatchNorm1d(1)
    col = lambda *v: torch.tensor(v)[:, None]
    m.sizes = 2, 2, 2
    out = m(col(1., 3, 10, 14, -2, -2.5))
    np.testing.assert_allclose(out.detach().flatten(), [-.99999499, .99999499, -.99999863, .99999863, .99992, -.99992], atol=1e-6)
    np.testing.assert_allclose([float(m.running_mean), float(m.running_var)], [.2, 1.1], rtol=1e-6)
    m(col(2., 6, 100, 300, -7, 9))
    np.testing.assert_allclose([float(m.running_mean), float(m.running_var)], [.58, 1.79], rtol=1e-6)
    m = SelectiveBatchNorm2d(1)
    m.sizes = 2, 2
    m(torch.cat([torch.arange(8.), torch.randn(8)]).view(4, 1, 2, 2))
    np.testing.assert_allclose([float(m.running_mean), float(m.running_var)], [.35, 1.5], rtol=1e-6)

@pytest.mark.parametrize('groups', [(2, 3), (3, 4), (7, -1), (), (-2, 8)], ids=str)
def test_groups_that_do_not_fit(groups):
    x, m = torch.randn(6, 2, 2, 2), SelectiveBatchNorm2d(2)
    m.sizes, was = groups, buffers(m)
    for f in (m, lambda o: selective_batch_norm(o, groups, m.running_mean, m.running_var)):
        with pytest.raises(ValueError, match='sizes: got groups'): f(x)
    assert differences(was, buffers(m)) == []

def test_a_group_of_one_row_and_a_wrong_shape():
    "As torch's own layers; the running statistics do not move, the next forward is as ever"
    m = SelectiveBatchNorm1d(2)
    m.sizes = 3, 1
    with pytest.raises(ValueError, match='more than 1 value'): m(torch.randn(4, 2))
    assert m.track_running_stats
    with pytest.raises(ValueError, match='expected 2D or 3D'): m(torch.randn(4, 2, 3, 3))

def nested():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ModuleDict(dict(a=nn.BatchNorm2d(4), b=nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)))),
                         nn.BatchNorm3d(2), nn.SyncBatchNorm(2))

def test_converter():
    "All layers at any depth, in place; twice is once; back again leaves nothing; other normalisations stay"
    m = nested()
    classes, keys, ids = [type(o) for o in m.modules()], list(m.state_dict()), [id(p) for p in m.parameters()]
    assert selective_bn(m) is m and selective_bn(m) is m
    assert [type(o) for o in batchnorms(m) if not isinstance(o, nn.InstanceNorm2d)] == [SelectiveBatchNorm2d, SelectiveBatchNorm1d, SelectiveBatchNorm3d, SelectiveSyncBatchNorm]
    assert list(m.state_dict()) == keys and [id(p) for p in m.parameters()] == ids
    m[1]['a'].sizes, m[1]['a'].clean_only = (2, 2), False
    assert plain_bn(m) is m and [type(o) for o in m.modules()] == classes
    assert 'sizes' not in vars(m[1]['a']) and 'clean_only' not in vars(m[1]['a'])
    plain_bn(plain_bn(m))   # nothing to undo
    assert [type(o) for o in m.modules()] == classes
    one = nn.BatchNorm2d(3)   # the model itself
    assert type(selective_bn(one)) is SelectiveBatchNorm2d and type(plain_bn(one)) is nn.BatchNorm2d

def test_copy_and_pickle():
    m = selective_bn(nested())
    m[1]['a'].sizes = 2, 4
    m[1]['a'](torch.randn(6, 4, 2, 2))
    for twin in (deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert [type(o) for o in twin.modules()] == [type(o) for o in m.modules()] and twin[1]['a'].sizes == (2, 4)
        assert differences(weights(m), weights(twin)) == []
        x = torch.randn(6, 4, 2, 2, generator=seeded())
        assert torch.equal(deepcopy(m)[1]['a'](x), twin[1]['a'](x))
    plain = nested()
    plain.load_state_dict(m.state_dict())
    assert differences(weights(plain), weights(m)) == []

class OwnNorm(nn.BatchNorm2d): pass

def test_a_class_of_its_own_is_refused():
    "By name, and the layers before it stay as they were"
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(OwnNorm(4)))
    with pytest.raises(TypeError, match=r'model: 2\.0 is a '): selective_bn(m)
    assert type(m[1]) is nn.BatchNorm2d

@pytest.mark.parametrize('track', [True, False])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_autocast_and_memory_format(track, memory):
    "bfloat16 in, bfloat16 out, statistics in float32, the layout of the input"
    m = selective_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=track))).to(memory_format=memory)
    own = deepcopy(plain_bn(deepcopy(m)))
    m[1].sizes = 3, 3
    x = torch.randn(6, 3, 6, 6, generator=seeded()).to(memory_format=memory)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = m(x)
        torch.testing.assert_close(out[:3], own(x[:3]))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=memory)
    if track:
        assert m[1].running_mean.dtype == torch.float32
        torch.testing.assert_close(m[1].running_var, own[1].running_var)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype):
    m = selective_bn(nn.BatchNorm2d(2)).to(dtype)
    m.sizes = 2, 2
    x = torch.randn(4, 2, 3, 3, generator=seeded()).to(dtype)
    out = m(x)
    assert out.dtype == dtype and out.isfinite().all()
    torch.testing.assert_close(out[2:].float(), F.batch_norm(x[2:].float(), None, None, training=True), atol=3e-2, rtol=3e-2)


# -- heads and the net around a model -------------------------------------------------------------
def head(c=8, f=8, k=10, **kw): return AuxiliaryHead(c, f, k, **{**dict(generator=seeded(), small=True), **kw})

@pytest.mark.parametrize('c, f, k, kw, want', [(512, 512, 100, {}, 5_626_980), (512, 512, 100, dict(attention=False), 5_626_980 - 4_720_640), (2048, 2048, 100, dict(generator=None), 89_354_340)],
                         ids=['resnet18', 'without', 'bottleneck'])
def test_parameters_of_a_head(c, f, k, kw, want):
    with torch.device('meta'):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(page, 'init_head', lambda *a: None)
            assert n_params(AuxiliaryHead(c, f, k, **kw)) == want

@pytest.mark.parametrize('kw, shape', [(dict(small=False), (3, 8, 3, 3)), (dict(), (3, 8, 1, 1)), (dict(attention=False), (3, 8, 2, 5)), (dict(bias=False), (3, 8, 4, 4)), (dict(c=1, f=7, k=2), (3, 1, 4, 4))], ids=str)
def test_head_of_any_size(kw, shape):
    h = head(**kw)
    z = h(torch.randn(shape, generator=seeded()))
    assert z.shape == (3, kw.get('k', 10)) and (h.fc.bias is None) == (kw.get('bias') is False)
    z.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in h.parameters())

def test_head_is_drawn_from_its_generator_alone():
    state = torch.get_rng_state()
    a, b, c = head(generator=seeded(1)), head(generator=seeded(1)), head(generator=seeded(2))
    assert torch.equal(state, torch.get_rng_state())
    assert differences(weights(a), weights(b)) == [] and differences(weights(a), weights(c))
    torch.manual_seed(3); a = head(generator=None)
    torch.manual_seed(3); b = head(generator=None)
    assert differences(weights(a), weights(b)) == []

def test_weights_of_a_head():
    "He's by outputs, torch's for the linear layer; transposed ones by the right side"
    h = head(64, 128, 50)
    for m in h.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            fan = nn.init._calculate_fan_in_and_fan_out(m.weight)[1]
            assert abs(float(m.weight.detach().std())/(2/fan)**.5 - 1) < .1
    bound = 128**-.5
    assert .9*bound < h.fc.weight.abs().max() <= bound and h.fc.bias.abs().max() <= bound

def around(make, n_heads=2, x=None, trunk=None, dtype=torch.float64):
    "A wrapped network, the same without, heads twice, the place."
    torch.manual_seed(0)
    model = make().to(dtype)
    ref, info = deepcopy(model), find_parts(model, x if x is not None else torch.rand(2, 1, 8, 8, dtype=dtype), 10, trunk)
    c, h, w = info['shape'][1:]
    heads = [head(c, info['fc'].in_features, small=min(h, w) < 3, generator=seeded(i)).to(dtype) for i in range(n_heads)]
    twins = deepcopy(heads)
    for m in (*info['bns'], *heads): selective_bn(m)
    return AuxiliaryNet(model, info['trunk'], heads, info['bns']), ref, twins, info['trunk']

def passes(ref, heads, trunk, x):
    "The views one after the other; all BatchNorm layers are put back after the clean one."
    maps = []
    handle = ref.get_submodule(trunk).register_forward_hook(lambda m, i, o: maps.append(o))
    out = [ref(x[0])]
    was = buffers(ref)
    for h,v in zip(heads, x[1:]):
        ref(v)
        out.append(h(maps[-1]))
    put_back(ref, was)
    handle.remove()
    return torch.stack(out)

@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), sizes, st.integers(0, 10**6), st.sampled_from([tiny_net, partial(small_cnn, widths=(4, 8)), partial(cifar_resnet18, 10, 1, width=.0625)]))
def test_one_forward_is_separate_passes(n_heads, b, seed, make):
    "Logits, gradients of trunk and heads, running statistics; those of the heads stay (0,1)"
    net, ref, heads, trunk = around(make, n_heads)
    x = torch.rand(n_heads + 1, b, 1, 8, 8, generator=seeded(seed), dtype=torch.float64)
    z, want = net.train()(x.flatten(0, 1)), passes(ref.train(), heads, trunk, x)
    torch.testing.assert_close(z, want)
    w = torch.randn(z.shape, generator=seeded(seed), dtype=torch.float64)
    a = torch.autograd.grad((z*w).sum(), list(net.parameters()))
    torch.testing.assert_close(a, torch.autograd.grad((want*w).sum(), [*ref.parameters(), *(p for h in heads for p in h.parameters())]))
    new = {k: v for k,v in buffers(ref).items() if 'num_batches' not in k}
    torch.testing.assert_close({k: v for k,v in buffers(net.model).items() if k in new}, new)
    for m in batchnorms(net.heads): assert not m.running_mean.any() and (m.running_var == 1).all()

def test_heads_see_their_own_view_only():
    net, *_ = around(tiny_net, 2)
    x = torch.rand(9, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    z = net.train()(x)
    for i in range(3):
        g, = torch.autograd.grad(z[i].square().sum(), x, retain_graph=True)
        assert [bool(o.any()) for o in g.split(3)] == [i == j for j in range(3)]

def test_net_in_evaluation_and_its_state():
    "Evaluation is that of the model; the state dict has its names and tensors; a copy and a pickle live on their own"
    net, ref, *_ = around(tiny_net)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(net.eval()(x), ref.eval()(x)) and unwrap(net) is net.model
    assert list(net.state_dict()) == list(ref.state_dict())
    new = tiny_net().double()
    net.load_state_dict(new.state_dict())
    assert differences(weights(net), weights(new)) == []
    net.train()
    views = torch.rand(9, 1, 8, 8, dtype=torch.float64)
    for twin in (deepcopy(net), pickle.loads(pickle.dumps(net))):
        a, b = deepcopy(net), deepcopy(twin)
        assert torch.equal(a(views), b(views)) and differences(weights(a), weights(b)) == [] and differences(weights(a), weights(net))

def test_rows_and_failing_forwards():
    "Rows that are no whole views are refused; whatever fails, the layers forget their groups"
    net, *_ = around(tiny_net)
    net.train()
    with pytest.raises(ValueError, match='x: got 8 rows for 3 views'): net(torch.rand(8, 1, 8, 8, dtype=torch.float64))
    for bad in (torch.rand(9, 2, 8, 8, dtype=torch.float64), torch.rand(9, 1, 8, 8)):
        with pytest.raises(RuntimeError): net(bad)
        assert net.n is None and net.x is None and all(m.sizes is None for m in batchnorms(net))
    z = net.model(torch.rand(4, 1, 8, 8, dtype=torch.float64))   # past the wrapper: an ordinary network
    assert z.shape == (4, 10)

def test_compiled_net():
    "Without a break in the graph; training, then evaluation, then another batch size"
    torch._dynamo.reset()
    net, ref, heads, trunk = around(tiny_net)
    same = deepcopy(net)
    fast = torch.compile(same, backend='eager', fullgraph=True)
    for b in (3, 3, 2):
        x = torch.rand(3*b, 1, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(fast.train()(x), net.train()(x))
        torch.testing.assert_close(fast.eval()(x), net.eval()(x))
        torch.testing.assert_close(buffers(same.model), buffers(net.model))
    torch._dynamo.reset()

@linux
@gloo
def test_two_processes(tmp_path):
    "Each with its own images: gradients of trunk and all heads are the mean of both; synchronised BatchNorm wants a GPU, also the selective one"
    x = torch.rand(2, 6, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    def f(rank):
        net = around(tiny_net)[0].train()
        ddp = nn.parallel.DistributedDataParallel(net)
        ddp(x[rank]).square().sum().backward()
        bn = SelectiveSyncBatchNorm(2)
        bn.sizes, why = (2, 2), ''
        try: bn(torch.rand(4, 2, 3, 3))
        except Exception as e: why = str(e)
        return [p.grad for p in net.parameters()], why, [k for k in ddp.state_dict()]
    a, b = two_processes(f, tmp_path)
    torch.testing.assert_close(a[0], b[0])
    own = []
    for v in x:
        net = around(tiny_net)[0].train()
        net(v).square().sum().backward()
        own.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(a[0], [(p + q)/2 for p,q in zip(*own)])
    assert 'expected input tensor to be on' in a[1] and not [k for k in a[2] if 'heads' in k]


# -- where the trunk ends -------------------------------------------------------------------------
class Renamed(nn.Module):
    "One ReLU for all layers, functions in the forward, names of its own."
    def __init__(self):
        super().__init__()
        self.c1, self.n1, self.c2, self.n2 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.say_it = nn.ReLU(inplace=True), nn.Linear(6, 10)
    def forward(self, x):
        x = self.relu(self.n1(self.c1(x)))
        x = self.relu(self.n2(self.c2(x)))
        return self.say_it(F.adaptive_avg_pool2d(x, 1).flatten(1))

class Twice(Renamed):
    "The same trunk a second time, on its own output."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.say_it = nn.Linear(4, 10)
    def forward(self, x): return self.say_it(self.body(self.body(self.c1(x))).mean((2, 3)))

class InPlace(Renamed):
    "What follows the trunk changes its output in place."
    def forward(self, x): return self.say_it(F.relu(self.n2(self.c2(F.relu(self.n1(self.c1(x))))), inplace=True).mean((2, 3)))

class TwoHeads(Renamed):
    "Another classifier of as many classes, called first and last."
    def __init__(self, last):
        super().__init__()
        self.other, self.last = nn.Linear(6, 10), last
    def forward(self, x):
        f = self.n2(self.c2(self.n1(self.c1(x)))).mean((2, 3))
        a = self.say_it(f)
        return a + 0*self.other(f) if self.last else self.say_it(f + 0*self.other(f).sum())

def tv(name, **kw):
    with torch.device('meta'): return getattr(torchvision.models, name)(weights=None, num_classes=10, **kw)

@pytest.mark.parametrize('name, trunk, c, fc', [('resnet18', 'layer4', 512, 'fc'), ('densenet121', 'features', 1024, 'classifier'), ('mobilenet_v2', 'features', 1280, 'classifier.1'),
                         ('efficientnet_b0', 'features', 1280, 'classifier.1'), ('shufflenet_v2_x0_5', 'conv5', 1024, 'fc'), ('vgg11_bn', 'avgpool', 512, 'classifier.6')])
def test_torchvision(name, trunk, c, fc):
    "Found without help; every BatchNorm of the trunk, and no other"
    m = tv(name)
    got = find_parts(m, torch.rand(2, 3, 224, 224, device='meta'), 10)
    assert got['trunk'] == trunk and got['shape'][1] == c and got['fc'] is m.get_submodule(fc) and got['shape'][2] > 1
    assert {id(o) for o in got['bns']} == {id(o) for o in batchnorms(m)}
    assert not [o for o in m.modules() if o._forward_hooks] and m.training

@pytest.mark.parametrize('make, n', [(lambda: small_cnn(), 3), (lambda: conv10(10, 1, .125), None), (lambda: conv11(10, 1, 8, .125, fc=16), None), (lambda: wide_resnet(10, 10, 1, 1), None),
                                     (lambda: cifar_resnet18(10, 1, .0625), 15), (tiny_net, 1), (InPlace, 2)])
def test_our_networks(make, n):
    "A fit with each; the first layers in evaluation do not change it"
    net, ref, heads, trunk = around(make, 1)
    assert n is None or len(net.bns['trunk']) == n
    x = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64)
    if make is not InPlace and not [m for m in ref.modules() if isinstance(m, nn.Dropout)]:
        torch.testing.assert_close(net.train()(x.flatten(0, 1)), passes(ref.train(), heads, trunk, x))
    assert finite(quiet_fit(learner([aux([dim])], model=make), 1, 1e-2))

def test_conv13_has_layers_of_its_own():
    net = lambda: conv13(10, 1, dropout=0.)
    refused(learner([aux([dim])], own_dls(shape=(1, 12, 12)), net), 'model: no separable head')

@pytest.mark.parametrize('make', [Renamed, Twice], ids=['relu', 'trunk'])
def test_a_module_called_several_times(make):
    "The rows are cut where the trunk ends, at its last call: heads and loss as with a module of its own, or a refusal that says so"
    learn = learner([aux()], model=make)
    try: quiet_fit(learn, 1, 1e-2)
    except ValueError as e: assert 'trunk' in str(e) and 'call' in str(e)
    else: assert finite(learn) and learn.recorder.values[-1][5] > 0

@pytest.mark.parametrize('last', [False, True])
def test_two_linear_heads(last):
    "The last one that gives a number for each class is tied"
    m = TwoHeads(last)
    assert find_parts(m, torch.rand(2, 1, 8, 8), 10)['fc'] is (m.other if last else m.say_it)

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
def no_linear(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def no_bn(norm=nn.Identity): return nn.Sequential(nn.Conv2d(1, 8, 3), norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

@pytest.mark.parametrize('make', [mlp, no_linear, partial(tiny_net, 9)], ids=['mlp', 'conv', 'classes'])
def test_no_separable_head(make): refused(learner([aux()], model=make), 'model: no separable head', 'Linear(..., 10)')

@pytest.mark.parametrize('norm', [nn.Identity, partial(nn.GroupNorm, 2, 8), partial(nn.InstanceNorm2d, 8)], ids=['none', 'group', 'instance'])
def test_no_batchnorm(norm):
    refused(learner([aux()], model=partial(no_bn, norm)), 'model: there is no BatchNorm', "batchnorm='joint'")
    quiet_fit(learner([aux(batchnorm='joint')], model=partial(no_bn, norm)), 1)

@pytest.mark.parametrize('trunk, words', [('nothing', ("trunk: got 'nothing'", '0, 1, 2')), ('5', ("trunk: ", "'5'")), ('6', ('6',)), ('', ('trunk',))])
def test_bad_trunk(trunk, words): refused(learner([aux(trunk=trunk)]), *words)

def test_trunk_by_name():
    "An earlier place: what comes after it is the main head's, its BatchNorm stays ordinary"
    def make(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    learn, seen = learner([aux(trunk='2')], model=make), []
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_batch', lambda o: seen.append([type(m).__name__ for m in batchnorms(unwrap(learn.model))])))
    assert seen[0] == ['SelectiveBatchNorm2d', 'BatchNorm2d'] and finite(learn)
    assert learn.auxiliary_training.heads[0].bottleneck[0].in_channels == 4

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_net()
    def forward(self, x): return (self.net(x), x) if self.training else self.net(x)

def test_model_with_a_tuple(): refused(learner([aux()], model=Both), 'model', 'tuple')


# -- losses ---------------------------------------------------------------------------------------
def test_losses_by_hand():
    z = t64([[[2, 1, 0], [0, 1, -1]], [[1, 1, 0], [0, 0, 0]], [[.5, -.5, 0], [-1, 2, 0]]])
    y, ties = torch.tensor([0, 1]), t64([2.26, .25])
    total = lambda **kw: float(sum(a*w for a,w in auxiliary_loss(z, y, ties, **kw).values()))
    for kw,want in ((dict(), .58049261), (dict(form='paper'), .49725305), (dict(gamma=1.), 3.0904926), (dict(gamma=1., form='paper'), .49725305 + .05*2.51), (dict(gamma=.05), .70599261)):
        assert math.isclose(total(**kw), want, abs_tol=1e-7), kw
    np.testing.assert_allclose([soft_ce(z[j], z[0]) for j in (1, 2)], [1.02531886, 1.027053], atol=1e-7)
    np.testing.assert_allclose([soft_ce(z[j], z[0], 3.) for j in (1, 2)], [1.08735693, 1.09671915], atol=1e-7)
    np.testing.assert_allclose([kl_distill(z[j], z[0]) for j in (1, 2)], [.19292325, .19465747], atol=1e-7)

@quick
@given(st.integers(0, 10**6), sizes, sizes, st.sampled_from([.5, 1., 3.]))
def test_both_forms(seed, b, k, T):
    "They differ by the teacher's entropy; the gradient of the student is the same, the teacher gets none; torch's KL"
    z, z0 = (3*torch.randn(b, k, generator=seeded(seed + i), dtype=torch.float64) for i in range(2))
    z.requires_grad_(), z0.requires_grad_()
    a, c = soft_ce(z, z0, T), kl_distill(z, z0, T)
    p = (z0/T).softmax(1)
    torch.testing.assert_close(a - c, -(p*p.log()).sum(1).mean())
    torch.testing.assert_close(c, F.kl_div((z/T).log_softmax(1), p, reduction='batchmean'))
    ga, gc = (torch.autograd.grad(o, [z, z0], allow_unused=True) for o in (a, c))
    torch.testing.assert_close(ga[0], gc[0])
    torch.testing.assert_close(ga[0], ((z/T).softmax(1) - p)/(b*T))
    assert ga[1] is None and gc[1] is None and c >= -1e-12

@pytest.mark.parametrize('f', [soft_ce, kl_distill])
def test_extreme_logits(f):
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for z0 in (z, z.flip(0), torch.tensor([[200., 0], [0, 200.]])):
        loss = f(z, z0)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()

@pytest.mark.parametrize('bias', [True, False])
def test_tie(bias):
    "To both sides, weights and biases; 0 and no gradient where they agree"
    a, b = nn.Linear(2, 3, bias).double(), nn.Linear(2, 3, bias).double()
    loss = tie_penalty(a, b)
    want = sum((p - q).square().sum() for p,q in zip(a.parameters(), b.parameters()))
    torch.testing.assert_close(loss, want)
    loss.backward()
    for p,q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, 2*(p - q).detach())
        torch.testing.assert_close(q.grad, -p.grad)
    assert tie_penalty(a, deepcopy(a)) == 0


# -- corruptions of the training ------------------------------------------------------------------
@quick
@given(st.lists(st.integers(0, 255), min_size=1, max_size=8), st.floats(-400, 400), st.booleans())
def test_bytes_and_noise_against_python(values, noise, wrap):
    "Cut towards 0, then modulo 256 or stopped; every number"
    x = torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, -1)
    n = torch.full(x.shape, noise)
    got = add_bytes(x, n, wrap).flatten().tolist()
    whole = [int(np.float32(v) + np.float32(noise)) for v in values]
    assert got == [v % 256 if wrap else min(max(v, 0), 255) for v in whole]

@pytest.mark.parametrize('byte, want', [(0, .48), (255, .48), (10, .29), (20, .147), (40, .02), (128, 0)])
def test_how_often_noise_wraps(byte, want):
    x = torch.full((1, 1, 200, 500), byte, dtype=torch.uint8)
    got = ByteNoise(20.)(x, seeded()).int()
    assert abs(float(((got - byte).abs() > 128).float().mean()) - want) < .01
    assert byte in (128, 40) or ((ByteNoise(20., False)(x, seeded()).int() - byte).abs() <= 128).all()

def pil(x): return [Image.fromarray(o.permute(1, 2, 0).numpy() if len(o) == 3 else o[0].numpy()) for o in x]
def back(im): return torch.from_numpy(np.array(im)).view(*im.size[::-1], -1).permute(2, 0, 1)

@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('kind', ['noise', 'flat', 'narrow'])
def test_jitter_against_pillow(c, kind):
    "Given factors and orders, image by image, bit for bit"
    x, jitter = images(12, c, 7, 9, kind=kind), ColorJitter(.5)
    factors, order = jitter.params(12, c, 7, 9, seeded(5))
    assert ((factors >= .5) & (factors <= 1.5)).all() and {tuple(o) for o in ColorJitter(.5).params(300, 1, 1, 1, seeded())[1].tolist()} == set(permutations(range(3)))
    kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for im,f,turn,got in zip(pil(x), factors.tolist(), order.tolist(), jitter.apply(x, factors, order)):
        for k in turn: im = kinds[k](im).enhance(np.float32(f[k]).item())
        assert torch.equal(got, back(im))

@pytest.mark.parametrize('c', [1, 3])
def test_rotation_against_pillow(c):
    x, turn = images(20, c, 9, 9), RandomRotation(30.)
    angle, = turn.params(20, c, 9, 9, seeded(2))
    assert angle.abs().max() <= 30 and angle.min() < -15 and angle.max() > 15
    for im,a,got in zip(pil(x), angle.tolist(), turn.apply(x, angle)):
        assert torch.equal(got, back(torchvision.transforms.functional.rotate(im, a)))

@pytest.mark.parametrize('t', [*TRAINING, *paper_views()['corruptions'], ByteNoise(5., False), GaussianBlur(0.), ByteNoise(0.), ColorJitter(0.), RandomRotation(0.)], ids=repr)
@pytest.mark.parametrize('shape', [(5, 3, 32, 32), (4, 1, 8, 8)], ids=str)
def test_every_corruption(t, shape):
    "Shape and type stay, floats stay in [0,1], the input is left alone, draws come from the generator only; strength 0 is nothing"
    x = images(*shape)
    for v in (x, x/255, (x/255).to(memory_format=torch.channels_last)):
        was, state = v.clone(), torch.get_rng_state()
        a, b = t(v, seeded(1)), t(v, seeded(1))
        assert torch.equal(a, b) and torch.equal(v, was) and torch.equal(state, torch.get_rng_state())
        assert a.shape == v.shape and a.dtype == v.dtype and (v.dtype == torch.uint8 or 0 <= a.min() <= a.max() <= 1)
        if str(t) in ('GaussianBlur(sigma=0.0)', 'ColorJitter(amount=0.0)', 'RandomRotation(degrees=0.0)') or 'sd=0.0' in str(t): torch.testing.assert_close(a, v)

@pytest.mark.parametrize('f', [lambda: GaussianBlur(-1), lambda: GaussianBlur(nan), lambda: ByteNoise(-.1), lambda: ByteNoise(nan), lambda: ColorJitter(1.1), lambda: ColorJitter(-.1), lambda: ColorJitter(nan),
                               lambda: RandomRotation(-1), lambda: RandomRotation(nan)])
def test_strengths_that_are_none(f):
    with pytest.raises(ValueError, match=r'^(sigma|sd|amount|degrees)=.*must be'): f()

@pytest.mark.parametrize('shape', [(6, 3, 32, 32), (6, 1, 8, 8)], ids=str)
def test_views_of_the_paper(shape):
    "Five views of the same images, each with a crop of its own; the turned one is not mirrored; a generator is all they need"
    x, cb = images(*shape)/255, AuxiliaryTrainingCallback(**paper_views(), seed=4)
    state = torch.get_rng_state()
    v, = cb.views(x)
    assert v.shape == (30, *shape[1:]) and 0 <= v.min() and v.max() <= 1 and torch.equal(state, torch.get_rng_state())
    assert torch.equal(v, AuxiliaryTrainingCallback(**paper_views(), seed=4).views(x)[0]) and not torch.equal(v, cb.views(x)[0])
    g = seeded(4)
    both, (blur, noise, jitter, turn) = Compose(ZeroCrop(4), RandomFlip()), TRAINING
    want = [both(x, g), *(both(f(x, g), g) for f in (blur, noise, jitter)), turn(ZeroCrop(4)(x, g), g)]
    assert torch.equal(v, torch.cat(want))

def test_views_without_augmentation():
    "Five images of one; one augmentation for all is drawn anew for each"
    x = images(6, 1, 8, 8)/255
    v, = AuxiliaryTrainingCallback().views(x)
    assert torch.equal(v[:6], x) and all(not torch.equal(o, x) for o in v.split(6)[1:])
    cb = aux([lambda o: o]*7, augment=RandomFlip(), seed=2)
    assert len({tuple((o == x).flatten(1).all(1).tolist()) for o in cb.views(x)[0].split(6)}) > 4


# -- one step -------------------------------------------------------------------------------------
MODES = [dict(), dict(form='paper', stage2=0.), dict(T=3., gamma=.2, stage2=0.), dict(alpha=0., lambda_=0.), dict(alpha=1., gamma=0.), dict(batchnorm='separate'), dict(batchnorm='joint', stage2=0.)]
modes = pytest.mark.parametrize('kw', MODES, ids=str)

@modes
def test_a_step_by_hand(kw):
    "Views from a generator of one's own, separate passes, the formula: loss, its gradient in trunk and heads, running statistics; fastai sees the clean logits"
    cb, seen, g, given_ = aux(seed=3, **kw), [], seeded(3), []
    own = kw.get('batchnorm', 'selective')
    def before(o):
        cb.twin = tiny_net()
        cb.twin.load_state_dict(unwrap(learn.model).state_dict())
        cb.twin_heads = [plain_bn(deepcopy(h)) for h in cb.heads]
        x, y = given_[-1]
        assert torch.equal(o.xb[0], torch.cat([x, dim(x), ByteNoise()(x, g)]))
    def check(o):
        x, trunk, rest = o.xb[0].chunk(3), cb.twin[:4], cb.twin[4:]
        if own == 'joint': maps = trunk(o.xb[0]).chunk(3)
        else:
            maps = [trunk(x[0])]
            was = buffers(cb.twin)
            maps += [trunk(v) for v in x[1:]]
            if own == 'selective': put_back(cb.twin, was)
        z = [rest(maps[0]), *(h(m) for h,m in zip(cb.twin_heads, maps[1:]))]
        y, fc, T = given_[-1][1], cb.twin[-1], kw.get('T', 1.)
        p0 = (z[0]/T).softmax(1).detach()
        loss = F.cross_entropy(z[0], y)
        gamma = kw.get('gamma', 1.)*(o.learn.pct_train >= kw.get('stage2', .5) - 1e-6)
        for o_,h in zip(z[1:], cb.twin_heads):
            distill = -(p0*(o_/T).log_softmax(1)).sum(1).mean()
            if kw.get('form') == 'paper': distill = distill + (p0*p0.log()).sum(1).mean()
            tie = (fc.weight - h.fc.weight).square().sum() + (fc.bias - h.fc.bias).square().sum()
            lam = kw.get('lambda_', .05)
            loss = loss + kw.get('alpha', .05)*F.cross_entropy(o_, y) + lam*distill + gamma*(lam if kw.get('form') == 'paper' else 1.)*tie
        torch.testing.assert_close(o.learn.loss_grad, loss)
        torch.testing.assert_close(o.pred, z[0])
        skip = 'num_batches' if own == 'selective' else '-'
        torch.testing.assert_close(*({k: v for k,v in buffers(m).items() if skip not in k} for m in (unwrap(learn.model), cb.twin)))
        ps = [*cb.twin.parameters(), *(p for h in cb.twin_heads for p in h.parameters())]
        cb.grads = torch.autograd.grad(loss, ps, allow_unused=True)
        seen.append(float(gamma))
    def grads(o):
        mine = [*unwrap(learn.model).parameters(), *(p for h in cb.heads for p in h.parameters())]
        for p,want in zip(mine, cb.grads, strict=True):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if want is None else want, rtol=1e-3, atol=1e-5)
    first = Every('before_batch', lambda o: given_.append([torch.as_tensor(v[0]).as_subclass(torch.Tensor) for v in (o.xb, o.yb)]))
    first.order = cb.order - 1
    learn = learner([cb, first])
    quiet_fit(learn, 1, 1e-3, cbs=[Every('before_batch', before), Every('after_loss', check), Every('before_step', grads)])
    late = kw.get('stage2', .5) == .5
    assert seen == [kw.get('gamma', 1.)*(not late or i > 1) for i in range(4)] and cb.n_step == 4

@pytest.mark.parametrize('stage2, epochs, steps, first', [(0, 1, 4, 0), (.5, 1, 4, 2), (.5, 3, 1, 2), (6/7, 7, 3, 18), (6/7, 2, 7, 12), (.3, 2, 5, 3), (.999, 4, 5, None), (.94, 4, 5, 19), (1/3, 3, 7, 7)], ids=str)
def test_when_stage_2_begins(stage2, epochs, steps, first):
    learn, seen = learner([cb := aux([dim], stage2=stage2)], digits_dls(steps=steps)), []
    if first is None: return refused(learn, f'stage2: {stage2}')
    quiet_fit(learn, epochs, 1e-3, cbs=Every('after_pred', lambda o: seen.append(cb.stage)))
    assert seen == [1 + (i >= first) for i in range(epochs*steps)]
    rows = [v[list(learn.recorder.metric_names).index('gamma') - 1] for v in learn.recorder.values]
    np.testing.assert_allclose(rows, np.mean(np.reshape(seen, (epochs, steps)) == 2, 1), atol=1e-6)

def test_stage_2_ties_the_heads():
    learn = quiet_fit(learner([aux([dim], gamma=10.)]), 8, 1e-2)
    tie = [v[list(learn.recorder.metric_names).index('tie') - 1] for v in learn.recorder.values]
    assert tie[3] > .5*tie[0] and tie[-1] < .2*tie[3]

def test_smaller_last_batch():
    rows, learn = [], learner([aux()], digits_dls(bs=12, steps=None))
    quiet_fit(learn, 2, 1e-2, cbs=Every('after_pred', lambda o: rows.append((len(o.pred), len(o.xb[0])))))
    assert rows == [(12, 36)]*3 + [(4, 12)] + [(12, 36)]*3 + [(4, 12)] and finite(learn)

def test_validation_is_plain():
    "The model alone on clean images: no view, no head, nothing drawn"
    cb, seen = aux(), []
    learn = learner([cb])
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: seen.append(tuple(o.pred.shape)) if not o.training else None, valid=True))
    assert seen == [(40, 10)]
    state = cb.state_dict()
    with learn.no_bar():
        got = learn.validate()
        z, y = learn.get_preds()
    assert math.isclose(got[0], F.nll_loss(torch.as_tensor(z).log(), torch.as_tensor(y)), rel_tol=1e-4)
    assert differences(state, cb.state_dict()) == []
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(z), learn.model.eval()(x).softmax(1))

def test_columns():
    "Of the epoch, and of one that has trained"
    learn, losses = learner([aux()]), []
    quiet_fit(learn, 2, 1e-2, cbs=Every('after_loss', lambda o: losses.append(float(o.loss))))
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'loss_clean', 'loss_aux', 'loss_distill', 'tie', 'gamma', 'time']
    v = learn.recorder.values[0]
    assert len(v) == 8 and v[7] == 0 and learn.recorder.values[1][7] == 1
    assert math.isclose(np.mean(losses[:4]), v[3] + .05*v[4] + .05*v[5], rel_tol=1e-5)

def test_nothing_draws_from_global_generators():
    "With a network without dropout: heads, views, a fit"
    dls = digits_dls()
    learn = learner([aux(), ], dls)
    learn.model[3].p = 0.
    learn.create_opt()
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    quiet_fit(learn, 1, 1e-2)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()

def test_no_warnings():
    "The callback hides nothing of the Learner's"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        quiet_fit(learner([aux()]), 1)
    assert not [o for o in seen if 'shadowing' in str(o.message)]

class Named(nn.Module):
    "A network whose parts have the names that a callback might use; fastai passes unknown names on to it."
    def __init__(self):
        super().__init__()
        self.net, self.heads, self.bns, self.was, self.fc, self.y, self.c, self.n, self.x, self.stage, self.sums, self.trunk = tiny_net(), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
    def forward(self, x): return self.net(x)

def test_names_of_the_model():
    a, b = (quiet_fit(learner([aux()], model=m), 1, 1e-2) for m in (tiny_net, Named))
    assert [float(o) for o in a.recorder.losses] == [float(o) for o in b.recorder.losses]


# -- seeds and resume -----------------------------------------------------------------------------
@pytest.mark.parametrize('kw', MODES[:2] + MODES[5:], ids=str)
def test_seeds(kw):
    a, b, c = (quiet_fit(learner([aux(seed=s, **kw)]), 1, 1e-2) for s in (0, 0, 1))
    assert differences(outcome(a), outcome(b)) == []
    assert differences(outcome(a)[0], outcome(c)[0])
    for x,y in ((a, c), (b, c)): assert differences(x.auxiliary_training.state_dict()['heads'], y.auxiliary_training.state_dict()['heads'])

@pytest.mark.parametrize('other', [dict(alpha=.5), dict(lambda_=.5), dict(gamma=2.), dict(stage2=0), dict(form='paper'), dict(T=3.), dict(batchnorm='joint'), dict(batchnorm='separate'),
                                   dict(head=partial(AuxiliaryHead, attention=False)), dict(augment=RandomFlip()), dict(trunk='1'), dict(seed=1)], ids=str)
def test_every_argument_matters(other):
    ends = [weights(quiet_fit(learner([aux(**kw)]), 1, 3e-2)) for kw in (dict(), other)]
    assert differences(*ends)

torch_adam = partial(OptimWrapper, opt=torch.optim.Adam)
torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
sgd = partial(SGD, mom=.9)

def whole_run(folder, kw=None, cbs=(), more=(), every=2, dls=digits_dls, **args):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    learn = learner([aux(**(kw or {})), Checkpoint(folder, every=every, keep=2), *more], dls(), **{**dict(opt_func=sgd), **args})
    return quiet_fit(learn, 3, 1e-2, cbs=cbs)

# Four batches in an epoch, files after 2, 4, 6 ... updates; stage 2 begins with the seventh
RUNS = [(3, 'before_batch', {}, {}), (4, 'after_batch', {}, {}), (5, 'after_pred', {}, dict(opt_func=torch_adam)), (8, 'after_step', {}, {}), (9, 'after_loss', MODES[5], {}),
        (11, 'after_backward', MODES[6], dict(opt_func=torch_sgd)), (12, 'after_batch', {}, {}), (7, 'before_step', paper_views(), {})]

@linux
@pytest.mark.parametrize('n, event, kw, args', RUNS, ids=lambda o: '' if isinstance(o, dict) else str(o))
def test_killed_and_resumed(n, event, kw, args, tmp_path):
    expected = read_checkpoint(whole_run(tmp_path/'a', kw, **args).checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        if not cb.training: return
        count[0] += 1
        if count[0] == n: die()
    assert in_child(lambda: whole_run(tmp_path/'b', kw, [Every(event, kill)], **args)) == signal.SIGKILL
    learn = whole_run(tmp_path/'b', kw, **args)
    assert differences(expected, read_checkpoint(learn.checkpoint.files()[-1])) == []
    assert len(learn.recorder.values) == 3

def test_resume_with_teacher_and_accumulation(tmp_path):
    def run(folder, *cbs): return whole_run(folder, {}, cbs, (EMATeacher(.5), GradientAccumulation(12)), every=1, dls=partial(digits_dls, bs=6, steps=8))
    def stop(o):
        if o.training and o.train_iter == 14: raise RuntimeError('here')
    expected = run(tmp_path/'a')
    with pytest.raises(RuntimeError): run(tmp_path/'b', Every('after_batch', stop))
    got = run(tmp_path/'b')
    assert differences(outcome(expected), outcome(got)) == [] and got.ema_teacher.n_updates == expected.ema_teacher.n_updates == 12
    assert got.auxiliary_training.n_step == 12

def test_resume_needs_the_same_heads(tmp_path):
    "Other corruptions, other heads: refused by the optimiser's groups"
    def stop(o):
        if o.train_iter == 5: raise RuntimeError('here')
    with pytest.raises(RuntimeError): whole_run(tmp_path, {}, [Every('after_batch', stop)])
    learn = learner([aux([dim]), Checkpoint(tmp_path, every=2, keep=2)], opt_func=sgd)
    with pytest.raises(ValueError, match='settings'): quiet_fit(learn, 3)

def test_state_of_the_callback():
    "Into a callback that has not trained yet, with its heads; onto one that has"
    a = quiet_fit(learner([aux()]), 1, 1e-2).auxiliary_training
    state = deepcopy(a.state_dict())
    assert state['n_step'] == 4 and len(state['heads']) == 2
    learn = learner([b := aux(seed=9)])
    b.load_state_dict(state)
    assert differences(b.state_dict(), state) == []
    learn.create_opt()
    quiet_fit(learn, 0)
    assert differences(b.state_dict(), state) == []


# -- looking, interrupting, going on --------------------------------------------------------------
@pytest.mark.parametrize('kw', MODES[:1] + MODES[5:], ids=str)
@pytest.mark.parametrize('trained', [False, True])
def test_looking_leaves_no_trace(kw, trained):
    "`lr_find`, `validate`, `get_preds`, `summary`: the fit after them is the fit that would have been, its columns too"
    a, b = (learner([aux(**kw)], opt_func=sgd) for _ in range(2))
    for l in (a, b): l.create_opt()
    if trained:
        for l in (a, b): quiet_fit(l, 1, 1e-2)
    at, torch_state, model = b.dls.train.state_dict(), torch.get_rng_state(), b.model
    with b.no_bar():
        b.lr_find(num_it=6, show_plot=False)
        untouched(b, model)
        b.validate()
        b.get_preds()
    untouched(b, model)
    b.dls.train.load_state_dict(at)
    torch.set_rng_state(torch_state)
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    assert differences(outcome(a)[:3], outcome(b)[:3]) == []
    assert differences(list(a.recorder.values[-1]), list(b.recorder.values[-1])) == []

def test_lr_find_before_the_first_fit():
    "Without an optimiser yet"
    learn = learner([aux()])
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    untouched(learn, learn.model)
    assert learn.auxiliary_training.n_step == 0 and all(not s for s in learn.auxiliary_training._opt_states.values() for k in s if k != 'do_wd')
    quiet_fit(learn, 1, 1e-2)
    assert finite(learn)

def interrupt(n, error=KeyboardInterrupt, valid=False):
    def stop(o):
        if o.train_iter >= n and (o.training or valid): raise error
    return stop

@pytest.mark.parametrize('splitter', [lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], lambda m: [list(m.body.parameters()), list(m.head.parameters())]], ids=['index', 'name'])
@pytest.mark.parametrize('how', ['reset', 'leave', 'export'])
def test_interrupted_and_split_anew(splitter, how, tmp_path):
    "Groups that are made from parts of the network, while the heads are still around it; `leave()` is the way out where no callback is asked, as in `export`"
    learn = learner([aux()], model=lambda: small_cnn(widths=(4, 8)), splitter=splitter, path=tmp_path, opt_func=sgd)
    model = learn.model
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1, 1e-2, cbs=Every('after_pred', interrupt(2)))
    if how != 'reset':
        learn.auxiliary_training.leave()
        untouched(learn, model)
    if how == 'export':
        learn.export('a.pkl')
        x = DIGITS.test.x[:20]
        again = load_learner(tmp_path/'a.pkl')
        with again.no_bar(): assert again.get_preds(dl=again.dls.test_dl(x))[0].shape == (20, 10)
    quiet_fit(learn, 1, 1e-2, reset_opt=how != 'export')
    untouched(learn, model)

EVENTS = ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch', 'before_validate', 'after_epoch']

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('how', ['fit', 'learner'])
def test_interrupted(event, how):
    "Ctrl-C: after it the network predicts, saves and trains on; with the callback given to `fit` nothing of it stays"
    learn = learner([cb := aux()] if how == 'learner' else [], opt_func=sgd)
    model, keys, twin = learn.model, list(learn.model.state_dict()), tiny_net()
    stop = Every(event, interrupt(2 if event != 'before_train' else 0, valid=True), valid=True)
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 2, 1e-2, cbs=[stop] if how == 'learner' else [aux(), stop])
    assert list(learn.model.state_dict()) == keys
    if how == 'fit': untouched(learn, model)
    twin.load_state_dict(learn.model.state_dict())
    with learn.no_bar(): z = torch.as_tensor(learn.get_preds()[0])
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(z, twin.eval()(x).softmax(1))
    untouched(learn, model)
    quiet_fit(learn, 1, 1e-2)
    untouched(learn, model)
    assert np.isfinite(learn.recorder.losses).all()

@pytest.mark.parametrize('event', ['after_pred', 'after_step', 'before_validate'])
def test_taken_away_while_it_is_around_the_model(event):
    learn = learner([cb := aux()], opt_func=sgd)
    model = learn.model
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 1, 1e-2, cbs=Every(event, interrupt(2, valid=True), valid=True))
    learn.remove_cb(cb)
    untouched(learn, model)
    quiet_fit(learn, 1, 1e-2)
    assert 'tie' not in learn.recorder.metric_names

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
def test_no_trace_after_cancel(event):
    learn = learner([], opt_func=sgd)
    model, n = learn.model, len(learn.cbs)
    quiet_fit(learn, 1, 1e-2, cbs=[cb := aux(), Every(event, interrupt(2, CancelFitException, True), valid=True)])
    untouched(learn, model)
    assert len(learn.cbs) == n and not [k for k,v in vars(cb).items() if isinstance(v, (nn.Module, torch.Tensor))]   # no network, no rows, no graph
    step = cb.n_step
    quiet_fit(learn, 1, 1e-2, cbs=cb)
    assert cb.n_step == step + 4

def test_interrupted_lr_find():
    learn = learner([cb := aux()])
    quiet_fit(learn, 1, 1e-2)
    before = deepcopy(cb.state_dict())
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(Every('after_batch', interrupt(3))): learn.lr_find(show_plot=False)
    learn.validate()
    untouched(learn, learn.model)
    assert differences(before, cb.state_dict()) == []
    quiet_fit(learn, 1, 1e-2)
    assert cb.n_step == 8 and cb.sums['_n'] == 4

def test_two_fits_are_one_state():
    "The heads go on, their momentum too; stage 2 is counted anew in each fit; without the callback in between nothing of it moves"
    learn = quiet_fit(learner([cb := aux()], opt_func=sgd), 1, 1e-2)
    state, seen = deepcopy(cb.state_dict()), []
    heads = [id(h) for h in cb.heads]
    momentum = [s['grad_avg'].clone() for s in cb._opt_states.values() if 'grad_avg' in s]
    learn.remove_cb(cb)
    quiet_fit(learn, 1, 1e-2)
    assert differences(state, cb.state_dict()) == [] and 'tie' not in learn.recorder.metric_names
    learn.add_cb(cb)
    def look(o):
        seen.append(cb.stage)
        if len(seen) == 1:
            now = [learn.opt.state[p]['grad_avg'] for h in cb.heads for p in h.parameters()]
            assert differences(momentum, now) == []
    quiet_fit(learn, 1, 1e-2, cbs=Every('before_batch', look))
    assert seen == [1, 1, 2, 2] and [id(h) for h in cb.heads] == heads and cb.n_step == 8

@pytest.mark.parametrize('how', ['reset', 'create', 'other'])
def test_a_new_optimiser_knows_nothing(how):
    "Not the momentum of the heads either"
    learn = quiet_fit(learner([cb := aux()], opt_func=sgd), 1, 1e-2)
    if how == 'create': learn.create_opt()
    if how == 'other':
        learn.opt_func = torch_adam
        learn.create_opt()
    seen = []
    def look(o):
        states = getattr(learn.opt, 'opt', learn.opt).state if how == 'other' else learn.opt.state
        seen.append([k for h in cb.heads for p in h.parameters() for k in states.get(p, {}) if k != 'do_wd'])
    quiet_fit(learn, 1, 1e-2, reset_opt=how == 'reset', cbs=Every('before_batch', look))
    assert seen[0] == [] and seen[1] and finite(learn)
    untouched(learn, learn.model)

@pytest.mark.parametrize('opt', [sgd, Adam, ranger, torch_adam, torch_sgd], ids=['sgd', 'adam', 'ranger', 'torch_adam', 'torch_sgd'])
@pytest.mark.parametrize('bn_bias', [False, True])
def test_optimisers(opt, bn_bias):
    "The heads move with all others, in the last group; fastai's decays kernels only, unless it is told otherwise"
    learn = learner([cb := aux()], opt_func=opt, wd_bn_bias=bn_bias, wd=.1, splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    start, seen = [], []
    def look(o):
        if not start: start.extend(p.detach().clone() for h in cb.heads for p in h.parameters())
        seen.append([len(g) for g in learn.opt.param_lists])
    quiet_fit(learn, 2, slice(1e-3, 1e-2), cbs=Every('before_batch', look))
    ps = [p for h in cb.heads for p in h.parameters()]
    assert seen == [[4, 2 + len(ps)]]*8 and all(not torch.equal(a, b) for a,b in zip(start, ps) if a.ndim > 1)
    if 'torch' not in str(opt) and not isinstance(getattr(opt, 'keywords', {}).get('opt'), type):
        states = list(cb._opt_states.values())
        assert sum(s.get('do_wd', True) for s in states) == (len(ps) if bn_bias else sum(p.ndim > 1 for p in ps))
    untouched(learn, learn.model)

def test_groups_and_freezing():
    "A frozen group stays frozen, the heads train; then all"
    learn = learner([cb := aux()], opt_func=sgd, splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())], train_bn=False)
    learn.freeze()
    start = weights(learn.model[0])
    quiet_fit(learn, 1, 1e-2)
    assert differences(start, weights(learn.model[0])) == [] and cb.n_step == 4
    learn.unfreeze()
    quiet_fit(learn, 1, slice(1e-4, 1e-2))
    assert differences(start, weights(learn.model[0]))
    untouched(learn, learn.model)

@pytest.mark.parametrize('make, words', [(partial(small_cnn, widths=(4, 6)), None), (lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 10)), ('model',)),
                                         (partial(no_bn, partial(nn.BatchNorm2d, 8)), None)], ids=['features', 'channels', 'same'])
def test_another_network(make, words):
    "It works, where the heads fit; else a refusal that speaks of the model, not torch's of a convolution"
    learn = quiet_fit(learner([cb := aux()]), 1, 1e-2)
    learn.model = model = make()
    learn.create_opt()
    try: quiet_fit(learn, 1, 1e-2)
    except ValueError as e: assert 'model' in str(e) or 'head' in str(e)
    else: assert words is None

def test_other_corruptions_between_two_fits():
    learn = quiet_fit(learner([cb := aux()]), 1, 1e-2)
    cb.corruptions.append(dim)
    with pytest.raises(ValueError): quiet_fit(learn, 1, 1e-2)

def test_start_epoch():
    "Epochs that are skipped count for the stage"
    learn, seen = learner([cb := aux()]), []
    quiet_fit(learn, 4, 1e-2, start_epoch=2, cbs=Every('before_batch', lambda o: seen.append(cb.stage)))
    assert seen == [2]*8


# -- with the rest of fastai ----------------------------------------------------------------------
def test_save_load_export(tmp_path):
    "In the middle and afterwards; what is saved is the deployed network, small, and nobody needs this callback to use it"
    learn = learner([aux(), SaveModelCallback(with_opt=True)], path=tmp_path, opt_func=sgd, model=partial(small_cnn, widths=(8, 64)))
    model, sizes_ = learn.model, []
    def inside(o):
        if o.train_iter == 2: learn.save('middle')
        if o.train_iter == 3: learn.load('middle')
    quiet_fit(learn, 2, 1e-2, cbs=Every('before_batch', inside))
    untouched(learn, model)
    bare = small_cnn(widths=(8, 64))
    bare.load_state_dict(torch.load(tmp_path/'models'/'middle.pth', weights_only=False)['model'])
    learn.save('after')
    learn.load('after')
    quiet_fit(learn, 1, 1e-2)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    x = DIGITS.test.x[:20]
    with learn.no_bar(), again.no_bar(): was, now = (l.get_preds(dl=l.dls.test_dl(x))[0] for l in (learn, again))
    assert torch.equal(was, now) and type(again.model) is type(model)
    learn.remove_cb(learn.auxiliary_training)
    learn.export('b.pkl')
    sizes_ = [(tmp_path/f'{k}.pkl').stat().st_size for k in 'ab']
    assert sizes_[0] < sizes_[1] + 50_000, sizes_   # no heads, none of their momentum

def test_exported_and_loaded_again(tmp_path):
    "An exported Learner has no images left: predictions do not need any"
    learn = quiet_fit(learner([aux()], path=tmp_path), 1, 1e-2)
    learn.export('a.pkl')
    learn.save('w')
    again = load_learner(tmp_path/'a.pkl')
    again.path = tmp_path
    again.load('w')
    x = DIGITS.test.x[:20]
    with learn.no_bar(), again.no_bar(): was, now = (l.get_preds(dl=l.dls.test_dl(x))[0] for l in (learn, again))
    assert torch.equal(was, now)

def test_copy_and_pickle_of_the_callback():
    learn = quiet_fit(learner([cb := aux()]), 1, 1e-2)
    learn.remove_cb(cb)
    for twin in (deepcopy(cb), pickle.loads(pickle.dumps(aux([GaussianBlur(1.)])))):
        quiet_fit(learn, 1, 1e-2, cbs=twin)
    quiet_fit(learn, 1, 1e-2, cbs=cb)

def test_teacher_beside_it():
    "The mean of students, without heads, hooks and selective layers; it answers in validation; one can go on alone"
    learn = quiet_fit(learner([aux(), EMATeacher(.5)]), 2, 1e-2)
    teacher, model = learn.ema_teacher.teacher, learn.model
    assert len(list(teacher.parameters())) == len(list(model.parameters())) and learn.ema_teacher.n_updates == 8
    with learn.no_bar(): z = learn.get_preds()[0]
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(z), teacher(x).softmax(1))
    untouched(learn, model)
    assert not [m for m in teacher.modules() if m._forward_hooks] and type(teacher[1]) is nn.BatchNorm2d
    learn.ema_teacher.adopt()
    assert differences(weights(teacher), weights(model)) == []

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('kw', MODES[:2] + MODES[5:], ids=str)
def test_mixed_precision_and_channels_last(kw):
    "The forward in bf16, loss and tie in fp32; weights and running statistics in fp32"
    seen, learn = [], learner([aux(**kw), MixedPrecision(AMPMode.BF16), ChannelsLast()], opt_func=sgd)
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', lambda o: seen.extend([o.pred.dtype, o.learn.loss.dtype, o.learn.loss_grad.dtype])))
    assert {torch.float32} == set(seen) and np.isfinite(learn.recorder.losses).all() and learn.model[1].running_var.dtype == torch.float32
    untouched(learn, learn.model)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_heads_have_the_type_of_the_network(dtype):
    "Also when it changes between two fits (fastai's own curve of losses knows float32 only, so the step is cut short)"
    learn, seen = learner([cb := aux([dim])], own_dls(dtype=dtype), model=tiny_net), []
    quiet_fit(learn, 0)
    learn.model.to(dtype)
    def look(o):
        seen.append({p.dtype for h in cb.heads for p in h.parameters()})
        raise CancelFitException
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_loss', look))
    assert seen == [{dtype}]

def test_accumulated_and_clipped_gradients():
    n, norms = [0], []
    learn = learner([cb := aux(), GradientAccumulation(16), GradientClip(.1)], digits_dls(steps=4), opt_func=SGD)
    def look(o):
        n[0] += 1
        norms.append(torch.stack([p.grad.norm() for p in learn.model.parameters()]).norm())
    after = Every('before_step', look)
    quiet_fit(learn, 1, 1e-2, cbs=after)
    assert n == [2] and cb.n_step == 2 and max(norms) <= .1001   # heads included

def test_trackers_and_loggers(tmp_path):
    learn = learner([aux(), EarlyStoppingCallback(min_delta=100., patience=0), CSVLogger()], path=tmp_path, opt_func=sgd)
    model = learn.model
    quiet_fit(learn, 4, 1e-2)
    rows = (tmp_path/'history.csv').read_text().splitlines()
    assert 2 <= len(rows) < 5 and rows[0].split(',')[4:9] == ['loss_clean', 'loss_aux', 'loss_distill', 'tie', 'gamma']
    assert all(len(r.split(',')) == 10 for r in rows)
    untouched(learn, model)

def test_best_model_comes_back(tmp_path):
    "SaveModelCallback loads it while the heads are still around"
    best, learn = [], learner([aux(), SaveModelCallback()], path=tmp_path, opt_func=sgd)
    quiet_fit(learn, 3, 1e-2, cbs=Every('after_epoch', lambda o: best.append((float(learn.recorder.values[-1][1]), weights(learn)))))
    assert differences(min(best, key=lambda o: o[0])[1], weights(learn)) == []

def test_train_metrics():
    learn = learner([aux()])
    learn.recorder.train_metrics = True
    quiet_fit(learn, 1, 1e-2)
    assert list(learn.recorder.metric_names)[1:5] == ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy'] and finite(learn)

def picture_dls(size=64, batch_tfms=()):
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1)),
                      get_y=lambda i: int(DIGITS.train.y[i]), splitter=IndexSplitter(range(12, 18)), item_tfms=Resize(size), batch_tfms=list(batch_tfms))
    return block.dataloaders(list(range(18)), bs=4, num_workers=0, device='cpu')

def test_pretrained_networks_and_normalize():
    "A DataBlock with Normalize, a vision_learner with its groups, `fine_tune`: corruptions see images in [0,1]"
    seen = []
    def look(x):
        seen.append((float(x.min()), float(x.max())))
        return x*.9
    learn = vision_learner(picture_dls(batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats, cuda=False)]), resnet18, pretrained=False, normalize=False, cbs=aux([look], stage2=.5))
    model, keys = learn.model, list(learn.model.state_dict())
    quiet_fit(learn, 1, 1e-3, how='fine_tune')
    assert list(model.state_dict()) == keys and np.allclose([min(o[0] for o in seen), max(o[1] for o in seen)], [0, 1], atol=1e-5)
    untouched(learn, model)
    assert learn.auxiliary_training.heads[0].fc.in_features == 512 and np.isfinite(learn.recorder.losses).all()

def test_normalised_without_normalize():
    refused(learner([aux()], shifted(own_dls())), 'dls.train: the images leave [0,1]')

def shifted(dls):
    dls.train.dataset.x = dls.train.dataset.x*4 - 2
    return dls

def test_frozen_batchnorm():
    "Layers that stay in evaluation mode: refused with the way out"
    learn = learner([aux(), BnFreeze()])
    learn.model[1].requires_grad_(False)
    refused(learn, 'model: 1 of 1 BatchNorm layers are frozen', 'BnFreeze', "batchnorm='joint'")
    learn = learner([aux()])
    refused(learn.add_cb(Every('before_train', lambda o: unwrap(learn.model)[1].eval())), 'frozen')
    learn = learner([aux(batchnorm='joint'), BnFreeze()])
    learn.model[1].requires_grad_(False)
    quiet_fit(learn, 1, 1e-2)
    assert learn.model[1].num_batches_tracked == 0

class Synchronise(Callback):
    "What fastai's DistributedTrainer does to the network before a fit."
    order = 11
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)

def test_synchronised_by_fastai():
    "The layers are others then: they must be selective all the same, or the fit be refused"
    a, b = (learner([aux([lambda x: 0*x + .9]), *more], opt_func=sgd) for more in ((), (Synchronise(),)))
    quiet_fit(a, 1, 1e-2)
    try: quiet_fit(b, 1, 1e-2)
    except ValueError as e: assert 'BatchNorm' in str(e) and 'sync' in str(e).lower()
    else: torch.testing.assert_close(weights(a), weights(b))

@pytest.mark.parametrize('kw', MODES[:1], ids=str)
def test_compiled_model(kw, tmp_path):
    "As the user compiled it; the same run; a second batch size, lr_find and saved weights"
    torch._dynamo.reset()
    a, b = (learner([aux(**kw)], digits_dls(bs=12, steps=None), path=tmp_path) for _ in range(2))
    ran = []
    def backend(gm, inputs):
        ran.append(1)
        return gm
    b.model = compiled = torch.compile(b.model, backend=backend)
    for l in (a, b): quiet_fit(l, 1, 1e-2)
    assert ran and b.model is compiled
    np.testing.assert_allclose([float(o) for o in a.recorder.losses], [float(o) for o in b.recorder.losses], rtol=1e-4)
    assert not [m for m in compiled.modules() if type(m).__name__.startswith('Selective')]
    torch._dynamo.reset()

def test_compiled_model_is_loaded(tmp_path):
    "While the heads are around: as lr_find, SaveModelCallback and `learn.load` do"
    learn = learner([aux()], path=tmp_path)
    learn.model = torch.compile(learn.model, backend=lambda gm, inputs: gm)
    state, seen = learn.model.state_dict(), []
    def look(o):
        if seen: return
        now = learn.model.state_dict()
        assert list(now) == list(state)
        learn.model.load_state_dict(state)
        seen.append(1)
    learn.create_opt()
    quiet_fit(learn, 1, 1e-2, cbs=[Every('before_train', look), Every('before_batch', lambda o: (_ for _ in ()).throw(CancelFitException))])
    assert seen == [1]


# -- corruptions and heads of all kinds -----------------------------------------------------------
class Darker(nn.Module):
    def forward(self, x): return .5*x
class Drawn(nn.Module):
    "A module that wants the generator."
    def forward(self, x, generator): return (x + .1*torch.rand(x.shape, generator=generator)).clamp(0, 1)
class Callable_:
    def __call__(self, x): return .5*x
    def method(self, x, generator=None): return (x + 0*torch.rand(1, generator=generator)).clamp(0, 1)
def scaled(x, k): return k*x
def with_option(x, k=.5): return k*x
def keyword(x, *, generator): return (x + 0*torch.rand(1, generator=generator)).clamp(0, 1)
def stars(*args, **kwargs):
    assert len(args) == 1 and not kwargs
    return .5*args[0]

KINDS_OF_CORRUPTION = dict(
    module=Darker(), drawn=Drawn(), function=dim, lambda_=lambda x: 1 - x, two=lambda x, g: (x + .1*torch.rand(x.shape, generator=g)).clamp(0, 1), partial=partial(scaled, k=.5),
    option=with_option, object=Callable_(), method=Callable_().method, keyword=keyword, stars=stars, ours=GaussianBlur(1.), composed=Compose(RandomFlip(), ByteNoise()), blur=partial(gaussian_blur, sigma=1.),
    fog=Corrupt('fog', 3), clamp=partial(torch.clamp, max=.5), flip=transforms.RandomHorizontalFlip(1.), tv=transforms.GaussianBlur(3), tv2=v2.GaussianBlur(3),
    tv_compose=transforms.Compose([transforms.RandomInvert(1.)]), builtin=torch.sigmoid)

@pytest.mark.parametrize('kind', KINDS_OF_CORRUPTION)
def test_kinds_of_corruptions(kind):
    learn = quiet_fit(learner([aux([KINDS_OF_CORRUPTION[kind]])], digits_dls(steps=2)), 1, 1e-2)
    assert finite(learn)

def inplace(x): return x.mul_(.5)

@pytest.mark.parametrize('kw', [dict(corruptions=[inplace, dim]), dict(corruptions=[dim, inplace]), dict(augment=[inplace, None, None]), dict(augment=[None, None, inplace])], ids=short)
def test_in_place(kw):
    "What changes its input in place spoils no other view: refused, or given a copy"
    x = torch.rand(4, 1, 8, 8, generator=seeded())
    cb = aux(**{**dict(corruptions=[dim, lambda o: o.clone()]), **kw})
    was = x.clone()
    try: v = cb.views(x)[0].split(4)
    except ValueError as e:
        assert 'in place' in str(e)
        return
    assert torch.equal(x, was)
    got = [float(o.sum()/was.sum()) for o in v]
    half, c = (kw.get('augment') or [None]*3), kw.get('corruptions') or [dim, None]
    want = [.5 if half[0] else 1.] + [(.5 if f is inplace else .6 if f is dim else 1.)*(.5 if g else 1.) for f,g in zip(c, half[1:])]
    np.testing.assert_allclose(got, want, rtol=1e-5)

@pytest.mark.parametrize('bad, words', [(lambda x: x[:, :, :-1], ('8, 1, 7, 8', '8, 1, 8, 8')), (lambda x: x.double(), ('same shape and type',)), (lambda x: (255*x).byte(), ('same shape and type',)),
                                        (lambda x: (x, 1), ('makes tuple',)), (lambda x: None, ('makes NoneType',)), (lambda x: 2*x + .5, ('leaves [0,1]',)), (lambda x: x - .5, ('leaves [0,1]',)),
                                        (lambda x: x*nan, ('[0,1]',)), (lambda x: x*inf, ('[0,1]',)), (lambda x: x.numpy(), ('makes ndarray',)), (lambda x: x[:4], ('same shape',)), (lambda x: x.repeat(1, 3, 1, 1), ('same shape',))], ids=range(12))
def test_bad_corruptions(bad, words): refused(learner([aux([dim, bad])]), 'corruptions: number 1', *words)

@pytest.mark.parametrize('kw', [dict(augment=[None, lambda x: x[..., 1:], None]), dict(augment=[lambda x: x[..., 1:], None, None]), dict(augment=lambda x: (x, 1))], ids=['corrupted', 'clean', 'tuple'])
def test_bad_augmentations(kw): refused(learner([aux(**kw)]), 'augment')

def test_heads_of_ones_own():
    "Any width, with and without a generator, a function; not without a linear layer or with another one"
    def slim(c, f, k): return nn.Sequential(nn.Conv2d(c, f, 1), nn.BatchNorm2d(f), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(f, k))
    def any_(c, f, k, **kw): return slim(c, f, k)
    for h in (slim, any_, partial(AuxiliaryHead, attention=False), lambda c, f, k, generator: AuxiliaryHead(c, f, k, generator=generator), lambda c, f, k, bias: AuxiliaryHead(c, f, k, bias=bias)):
        learn = quiet_fit(learner([aux(head=h)]), 1, 1e-2)
        assert finite(learn) and len(learn.auxiliary_training.heads) == 2
    refused(learner([aux(head=lambda c, f, k: nn.Sequential(nn.Conv2d(c, k, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))]), 'head: number 0 has no nn.Linear')
    refused(learner([aux(head=lambda c, f, k: slim(c, f + 1, k))]), 'head: number 0', '(10, 9)', '(10, 8)', 'tied')
    refused(learner([aux(head=lambda c, f, k: AuxiliaryHead(c, f, k, bias=False))]), 'head: number 0', 'tied')
    def without(): return nn.Sequential(*list(tiny_net())[:-1], nn.Linear(8, 10, bias=False))
    quiet_fit(learner([aux()], model=without), 1, 1e-2)


# -- bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(form='kl'), dict(form=None), dict(batchnorm='plain'), dict(batchnorm=True), dict(alpha=-.1), dict(alpha=nan), dict(lambda_=inf), dict(lambda_=-1), dict(gamma=-1), dict(gamma=nan),
                                dict(T=0), dict(T=-1.), dict(T=nan), dict(T=inf), dict(stage2=1), dict(stage2=-.1), dict(stage2=nan), dict(stage2=True), dict(stage2=2)], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises((ValueError, TypeError)) as e: AuxiliaryTrainingCallback(**kw)
    assert str(e.value).startswith(f'{name}: got') and str(value) in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('kw', [dict(corruptions=[]), dict(corruptions='blur'), dict(corruptions=['blur']), dict(corruptions=None), dict(corruptions=GaussianBlur(1.)), dict(corruptions=[3]), dict(augment=[None]*4),
                                dict(augment=[]), dict(augment='flip'), dict(augment=[None, 'flip', None, None, None]), dict(augment=3)], ids=str)
def test_lists_that_are_none(kw):
    name = next(iter(kw))
    with pytest.raises((ValueError, TypeError), match=f'^{name}: '): AuxiliaryTrainingCallback(**kw)

@pytest.mark.parametrize('kw', [dict(alpha=None), dict(alpha='x'), dict(lambda_=None), dict(gamma='1'), dict(T=None), dict(stage2='late'), dict(stage2=None)], ids=str)
def test_types_of_numbers(kw):
    with pytest.raises((ValueError, TypeError), match=f'^{next(iter(kw))}: '): AuxiliaryTrainingCallback(**kw)

def test_stage_2_that_never_comes():
    refused(learner([aux(stage2=.999999)]), 'stage2: 0.999999 of 4 steps begins at step 4', 'gamma=0')
    refused(learner([AuxiliaryTrainingCallback([dim])], digits_dls(steps=3)), 'stage2')
    quiet_fit(learner([aux(stage2=.999999, gamma=0)]), 1)

@pytest.mark.parametrize('other', [MixUp, CutMix, BCLearningCallback, partial(MixMatchCallback, K=1), partial(aux, [dim])], ids=['mixup', 'cutmix', 'bc', 'mixmatch', 'itself'])
def test_two_that_replace_the_loss(other):
    learn = learner([a := aux(), b := other()])
    model = learn.model
    refused(learn, 'replaces the loss')
    for cb in [c for c in learn.cbs if c in (a, b)]: learn.remove_cb(cb)
    untouched(learn, model)

def items_with(y):
    items = Items()
    items.y = y(items.y)
    return items

def test_labels():
    for f in (lambda y: y + 10, lambda y: -1 - y): refused(learner([aux()], own_dls(items_with(f))), 'a label lies outside the 10 classes')
    refused(learner([aux()], own_dls(items_with(lambda y: F.one_hot(y, 10)))), 'labels of shape (8, 10) and torch.int64')
    refused(learner([aux()], own_dls(items_with(lambda y: y.float()))), 'labels of shape (8,) and torch.float32')
    refused(learner([aux()], own_dls(bs=1)), 'a batch of one image')
    dls = own_dls()
    del dls.c
    refused(learner([aux()], dls), 'dls: it does not say its number of classes')

def test_images():
    dls = own_dls()
    dls.train.dataset.x[:, 0, 3, 3] = nan
    refused(learner([aux()], dls), 'step 0: the images are not finite', error=FloatingPointError)
    bright = own_dls(dtype=torch.uint8)
    bright.train.dataset.x = bright.train.dataset.x + 100
    refused(learner([aux()], bright), 'leave [0,1]')
    refused(learner([aux()], shifted(own_dls())), 'the images leave [0,1]', 'Normalize')
    class TwoImages(Items):
        def __getitem__(self, i): return self.x[i], self.x[i], self.y[i]
    refused(learner([aux()], own_dls(TwoImages())), 'dls.train: got 2 inputs and 1 targets', 'expected one of each')

def test_bad_loss():
    def spoil(o):
        if cb.n_step == 2:
            with torch.no_grad(): cb.heads[1].fc.bias.fill_(nan)
    learn = learner([cb := aux()])
    with pytest.raises(FloatingPointError, match='step 2: the loss term'): quiet_fit(learn, 1, cbs=Every('before_batch', spoil))

def test_without_validation_images():
    "fastai trains without; so does the callback"
    dls = DataLoaders(loader(Items()), loader(Items(0), 8, False))
    dls.c = 10
    quiet_fit(learner([], dls), 1)
    learn = learner([cb := aux()], dls)
    quiet_fit(learn, 1, 1e-2)
    assert cb.n_step == 5

def test_already_in_parallel():
    learn = learner([aux()])
    learn.model = nn.DataParallel(learn.model)
    refused(learn, 'model: it is in a DataParallel already')

@pytest.mark.parametrize('how', ['validate', 'get_preds', 'corruption_errors'])
def test_evaluated_in_the_middle_of_a_fit(how):
    "After an epoch, by a callback: the fit goes on with its heads"
    learn, busy = learner([cb := aux()], opt_func=sgd), []
    model, kw = learn.model, dict(names=['gaussian_blur'], severities=(1,)) if how == 'corruption_errors' else {}
    def look(o):
        if busy or o.epoch > 1: return
        busy.append(1)
        with learn.no_bar(): getattr(learn, how)(**kw)
        busy.clear()
    quiet_fit(learn, 3, 1e-2, cbs=Every('after_epoch', look))
    assert cb.n_step == 12
    untouched(learn, model)

def test_evaluated_after_a_fit():
    learn = quiet_fit(learner([cb := aux()]), 1, 1e-2)
    state, model = deepcopy(cb.state_dict()), learn.model
    with learn.no_bar(): report = learn.corruption_errors(names=['gaussian_blur'], severities=(1,))
    assert report.errors.shape == (1, 1) and differences(state, cb.state_dict()) == []
    untouched(learn, model)
