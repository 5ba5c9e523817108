"Networks: what the page `02_models` cannot say in passing."
import copy, math, pickle
from dataclasses import replace

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from ssl_notes.augment import Compose, RandomCrop, RandomFlip
from ssl_notes.core import frozen_bn_stats
from ssl_notes.data import get_digits
from ssl_notes.models import (CIFAR_MEAN_STD, CONV13, ENVNET, ENVNET_V2, GCN, STYLES, ZCA, BasicBlock, CheckWaves,
                              InputNoise, NormalizeInput, PerImageNorm, PreActBlock, SameConv2d, WRNStyle, WeightNorm,
                              WeightNormConv2d, WeightNormLinear, cifar_resnet18, conv10, conv11, conv13, data_init,
                              draw_weights, envnet, envnet_least, envnet_map, envnet_v2, get_style,
                              global_contrast_normalize, init_weights, mean_cov, mean_only_bn, n_params,
                              per_image_normalize, same_padding, small_cnn, wide_resnet, wn_weight, zca_matrix)

torch.set_num_threads(1)
seeded = lambda s=0: torch.Generator().manual_seed(s)
tiny = dict(depth=10, width=.5)


# -- parameter counts ---------------------------------------------------------------------------
@pytest.mark.parametrize('kw, official, pytorch', [
    (dict(), 1_469_642, 1_467_610), (dict(n_classes=100), 1_481_252, 1_479_220),
    (dict(stages=4), 5_933_770, 5_929_434), (dict(width=135/16), 25_985_290, 25_976_769)])
def test_published_counts(kw, official, pytorch):
    assert n_params(wide_resnet(style='official', **kw)) == official
    assert n_params(wide_resnet(style='pytorch', **kw)) == pytorch

@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2), st.sampled_from([.25, .5, 1, 1.5, 2]), st.integers(1, 4), st.integers(2, 20),
       st.integers(1, 3), st.sampled_from(list(STYLES)))
def test_count_formula(n, width, in_channels, classes, stages, style):
    "The count, added up by hand from the table of the paper"
    f, bias = round(16*width), style == 'official'
    conv = lambda i, o, k: i*o*k*k + bias*o
    total, c = conv(in_channels, 16, 3), 16
    for s in range(stages):
        o = f << s
        for b in range(n):
            total += 2*c + conv(c, o, 3) + 2*o + conv(o, o, 3) + (conv(c, o, 1) if c != o else 0)
            # at width 1 the first block keeps 16 channels, and later ones always change them
            c = o
    total += 2*c + c*classes + classes
    model = wide_resnet(classes, 6*n + 4, width, in_channels, style, stages=stages)
    assert n_params(model) == total


# -- padding ------------------------------------------------------------------------------------
@given(st.integers(1, 70), st.integers(1, 7), st.integers(1, 4))
def test_same_padding_properties(n, k, s):
    before, after = same_padding(n, k, s)
    assert 0 <= before <= after <= before + 1
    if before + after: assert (n + before + after - k) // s + 1 == math.ceil(n/s)
    else: assert (n - k) // s + 1 >= math.ceil(n/s) # a stride wider than the kernel needs no padding

@settings(deadline=None, max_examples=30)
@given(st.integers(3, 17), st.integers(3, 17), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(0, 99))
def test_same_conv_against_a_loop(h, w, k, s, seed):
    "Every output pixel from the definition: zeros outside, the window starts at s*i - before"
    g = seeded(seed)
    c = SameConv2d(2, 3, k, stride=s)
    x = torch.randn(1, 2, h, w, generator=g)
    (t, _), (l, _) = same_padding(h, k, s), same_padding(w, k, s)
    big = F.pad(x, (9, 9, 9, 9))
    want = torch.stack([torch.stack([
        (big[0, :, 9+s*i-t:9+s*i-t+k, 9+s*j-l:9+s*j-l+k] * c.weight).sum((1, 2, 3)) + c.bias
        for j in range(-(-w//s))], -1) for i in range(-(-h//s))], -2)
    torch.testing.assert_close(c(x)[0], want, rtol=1e-4, atol=1e-5)

def test_official_pads_behind_and_ports_pad_around():
    for style, pad in (('official', (0, 1, 0, 1)), ('pytorch', (1, 1, 1, 1))):
        model = wide_resnet(style=style, **tiny)
        for i in (2, 3):
            conv = model.body.get_submodule(f'stage{i}')[0].conv1
            x = torch.randn(2, conv.in_channels, 16, 16)
            want = F.conv2d(F.pad(x, pad), conv.weight, conv.bias, stride=2)
            torch.testing.assert_close(conv(x), want)

@pytest.mark.parametrize('size', [(32, 32), (31, 33), (8, 8), (1, 5)])
@pytest.mark.parametrize('style', list(STYLES))
def test_any_size(size, style):
    model = wide_resnet(7, style=style, **tiny).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 7)


# -- what the two styles are --------------------------------------------------------------------
def test_styles_reach_every_layer():
    for name, s in STYLES.items():
        model = wide_resnet(style=name, **tiny)
        bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert {(m.eps, m.momentum) for m in bns} == {(s.bn_eps, s.bn_momentum)}
        assert {m.bias is not None for m in convs} == {s.conv_bias}
        assert sum(isinstance(m, SameConv2d) for m in convs) == (4 if s.padding == 'same' else 0)
        assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {.1}

def test_a_mixture_of_styles():
    mixed = replace(STYLES['official'], conv_bias=False, bn_momentum=.05)
    model = wide_resnet(style=mixed)
    assert n_params(model) == 1_467_610 and model.body.bn.momentum == .05
    assert isinstance(model.body.stage2[0].conv1, SameConv2d)

def test_only_the_very_first_block_activates_before_the_residual():
    model = wide_resnet(depth=16, width=1)
    flags = [m.activate_before_residual for m in model.modules() if isinstance(m, PreActBlock)]
    assert flags == [True] + [False]*5

@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('c_out, stride', [(4, 1), (8, 1), (8, 2), (4, 2)])
def test_block_against_the_formula(first, c_out, stride):
    b = PreActBlock(4, c_out, stride, STYLES['pytorch'], first)
    init_weights(b, generator=seeded())
    x = torch.randn(3, 4, 8, 8, generator=seeded(1))
    keep = x.clone()
    bn = lambda m, x: F.batch_norm(x, None, None, m.weight, m.bias, True, 0, m.eps)
    h = F.leaky_relu(bn(b.bn1, x), .1)
    out = F.conv2d(F.leaky_relu(bn(b.bn2, F.conv2d(h, b.conv1.weight, None, stride, 1)), .1), b.conv2.weight, None, 1, 1)
    short = h if first else x
    if (c_out, stride) != (4, 1): short = F.conv2d(short, b.shortcut.weight, None, stride)
    torch.testing.assert_close(b(x), short + out, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, keep) # the in-place activation must not touch the input

@pytest.mark.parametrize('model', [lambda: wide_resnet(depth=16, width=1),
                                   lambda: wide_resnet(depth=16, width=1, style='pytorch'),
                                   lambda: wide_resnet(depth=10, width=2, stages=4),
                                   lambda: small_cnn(in_channels=3)])
def test_every_parameter_gets_a_gradient(model):
    "The ports' error would leave bn1 of two blocks without one"
    model = model()
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    no = [n for n,p in model.named_parameters() if p.grad is None]
    # a bias right before a BatchNorm has a gradient of zero up to rounding, so ask weights only
    no += [n for n,p in model.named_parameters() if n.endswith('weight') and not p.grad.any()]
    assert not no


@pytest.mark.parametrize('stages', [3, 4])
def test_no_bias_changes_an_output_in_training(stages):
    "What a bias adds to a channel reaches a BatchNorm, directly or through 1x1 shortcuts"
    model, x = wide_resnet(stages=stages, **tiny).double(), torch.rand(4, 3, 32, 32).double()
    with torch.no_grad():
        before = model(x)
        for m in model.modules():
            if isinstance(m, nn.Conv2d): m.bias.normal_(generator=seeded())
        torch.testing.assert_close(model(x), before)


# -- weights ------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [lambda g: wide_resnet(generator=g, **tiny), lambda g: small_cnn(generator=g)])
def test_weights_come_from_the_generator_alone(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = make(seeded()), make(seeded()), make(seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    sa, sb, sc = (m.state_dict() for m in (a, b, c))
    assert all(torch.equal(sa[k], sb[k]) for k in sa)
    assert not torch.equal(sa['head.weight'], sc['head.weight'])

def test_without_a_generator_torch_manual_seed_decides():
    torch.manual_seed(3); a = small_cnn()
    torch.manual_seed(3); b = small_cnn()
    c = small_cnn()
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(b.head.weight, c.head.weight)

@pytest.mark.parametrize('style', list(STYLES))
def test_initial_distributions(style):
    model = wide_resnet(100, width=4, depth=16, style=style, generator=seeded())
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000:
            std = math.sqrt(2 / (m.kernel_size[0]**2 * m.out_channels))
            assert abs(m.weight.std()/std - 1) < .02 and abs(m.weight.mean()) < .05*std
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None: assert not m.bias.any()
        if isinstance(m, nn.BatchNorm2d): assert m.weight.eq(1).all() and not m.bias.any()
    w = model.head.weight
    std = math.sqrt(2 / sum(w.shape))
    assert abs(w.std()/std - 1) < .02
    assert (w.abs().max() > 2.3*std) == (style == 'pytorch') # the cut is at 2/0.8796 = 2.27 of them

def test_init_weights_resets_everything():
    model = small_cnn(generator=seeded())
    want = copy.deepcopy(model.state_dict())
    model(torch.rand(8, 1, 8, 8))
    for p in model.parameters(): p.data.add_(1)
    init_weights(model, generator=seeded())
    assert all(torch.equal(v, want[k]) for k,v in model.state_dict().items())


# -- the three parts, and how they travel -------------------------------------------------------
@pytest.mark.parametrize('model, f', [(lambda: wide_resnet(**tiny), 32), (lambda: small_cnn(in_channels=3), 128)])
def test_parts(model, f):
    model, x = model().eval(), torch.rand(5, 3, 16, 16)
    assert isinstance(model, nn.Sequential) and [n for n,_ in model.named_children()] == ['norm', 'body', 'head']
    feats = model.body(model.norm(x))
    assert feats.shape == (5, f) and isinstance(model.head, nn.Linear)
    torch.testing.assert_close(model.head(feats), model(x))

@pytest.mark.parametrize('model', [lambda: wide_resnet(**tiny), lambda: small_cnn(in_channels=3)])
def test_copies_and_files(model, tmp_path):
    m = model().eval()
    x, f = torch.rand(2, 3, 16, 16), tmp_path/'m.pth'
    want = m(x)
    assert torch.equal(copy.deepcopy(m)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(m))(x), want)
    torch.save(m.state_dict(), f)
    other = model().eval()
    other.load_state_dict(torch.load(f, weights_only=True))
    torch.testing.assert_close(other(x), want)

def test_memory_format_and_bf16():
    m, x = wide_resnet(**tiny).eval(), torch.rand(4, 3, 16, 16)
    want = m(x)
    torch.testing.assert_close(m(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)
    m.to(memory_format=torch.channels_last)
    torch.testing.assert_close(m(x), want, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = m(x)
    torch.testing.assert_close(y.float(), want, rtol=.1, atol=.1)


# -- input normalisation and bad input ----------------------------------------------------------
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(.01, 2)), min_size=1, max_size=5))
def test_normalize_against_a_loop(ms):
    mean, std = zip(*ms)
    x = torch.rand(2, len(ms), 3, 3, generator=seeded())
    want = torch.stack([(x[:, i] - m)/s for i,(m,s) in enumerate(ms)], 1)
    torch.testing.assert_close(NormalizeInput(mean, std)(x), want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('f, error, words', [
    (lambda: wide_resnet(depth=27), ValueError, ['depth=27', '6n+4']),
    (lambda: wide_resnet(depth=4), ValueError, ['depth=4']),
    (lambda: wide_resnet(width=0), ValueError, ['width=0']),
    (lambda: wide_resnet(width=-1), ValueError, ['width=-1']),
    (lambda: wide_resnet(stages=0), ValueError, ['stages=0']),
    (lambda: wide_resnet(n_classes=0, **tiny), ValueError, ['n_classes=0']),
    (lambda: wide_resnet(style='tf'), ValueError, ["'tf'", 'official', 'pytorch']),
    (lambda: wide_resnet(style=WRNStyle(padding='full')), ValueError, ["padding='full'"]),
    (lambda: wide_resnet(style=WRNStyle(dense_init='zero')), ValueError, ["dense_init='zero'"]),
    (lambda: get_style(3), ValueError, ['style=3']),
    (lambda: wide_resnet(normalize=([.5]*4, .5)), ValueError, ['mean', 'in_channels=3']),
    (lambda: NormalizeInput(std=[1., 0.]), ValueError, ['std']),
    (lambda: small_cnn()(torch.rand(2, 3, 8, 8)), ValueError, ['3 channel', 'in_channels=1']),
    (lambda: wide_resnet(**tiny)(torch.rand(2, 1, 8, 8)), ValueError, ['1 channel', 'in_channels=3']),
    (lambda: small_cnn()(torch.rand(1, 8, 8)), ValueError, ['(B,C,H,W)', '(1, 8, 8)']),
    (lambda: small_cnn()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), TypeError, ['uint8', '/255']),
])
def test_bad_input(f, error, words):
    with pytest.raises(error) as e: f()
    assert all(w in str(e.value) for w in words), e.value


# -- weight norm and mean-only batch norm -------------------------------------------------------
wn_layers = lambda model: [m for m in model.modules() if isinstance(m, WeightNorm)]
narrow = lambda **kw: conv13(**{**dict(width=4, generator=seeded()), **kw})
images = lambda n=16, c=3, size=16, seed=1: torch.rand(n, c, size, size, generator=seeded(seed))

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([(), (1,), (3, 3)]), st.integers(0, 99))
def test_weight_norm_against_a_loop(out, into, kernel, seed):
    v, g = torch.randn(out, into, *kernel, generator=seeded(seed)), torch.randn(out, generator=seeded(seed+1))
    want = torch.stack([g[i]*v[i]/v[i].square().sum().sqrt() for i in range(out)])
    torch.testing.assert_close(wn_weight(v, g), want)
    torch.testing.assert_close(wn_weight(v*3, g), want) # the length of v says nothing
    torch.testing.assert_close(wn_weight(v, g).flatten(1).norm(dim=1), g.abs())

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (3,), (2, 5)]), st.floats(-50, 50), st.integers(0, 99))
def test_mean_only_bn_properties(n, c, rest, shift, seed):
    t, b = torch.randn(n, c, *rest, generator=seeded(seed)).double(), torch.randn(c, generator=seeded(seed+1)).double()
    y, m = mean_only_bn(t, b)
    flat = lambda o: o.transpose(0, 1).flatten(1)
    torch.testing.assert_close(m, flat(t).mean(1))
    torch.testing.assert_close(flat(y).mean(1), b)
    torch.testing.assert_close(mean_only_bn(t + shift, b)[0], y) # a constant goes
    torch.testing.assert_close(flat(y).var(1, correction=0), flat(t).var(1, correction=0)) # the spread stays
    torch.testing.assert_close(mean_only_bn(t, b, m)[0], y)

def test_gradients_flow_through_the_batch_mean():
    "A constant added to all inputs changes nothing in training, so its gradient is zero"
    layer, x = WeightNormLinear(3, 2, generator=seeded()).double(), torch.randn(5, 3).double()
    c = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    layer(x + c).square().sum().backward()
    torch.testing.assert_close(c.grad, torch.zeros(3).double())
    assert torch.autograd.gradcheck(layer, x.requires_grad_())

@pytest.mark.parametrize('make', [lambda: WeightNormLinear(3, 2, momentum=.1, generator=seeded()),
                                  lambda: WeightNormConv2d(3, 2, 3, 1, momentum=.1, generator=seeded())])
def test_training_evaluation_and_the_running_mean(make):
    layer = make()
    shape = (6, 3) if isinstance(layer, WeightNormLinear) else (6, 3, 5, 5)
    x, mean = torch.randn(shape, generator=seeded(1)) + 1, torch.zeros(2)
    for _ in range(3):
        t = layer.product(x).transpose(0, 1).flatten(1)
        layer(x)
        mean = .9*mean + .1*t.mean(1)
        torch.testing.assert_close(layer.running_mean, mean)
    layer.eval()
    y = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y, t - mean[:, None])
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-5) # images do not see each other
    torch.testing.assert_close(layer.running_mean, mean)

def test_frozen_stats():
    "A training-mode forward uses the batch, the running means stay, and the switch is put back"
    model, x = narrow(noise=0., dropout=0.), images()
    want, before = model(x), [m.running_mean.clone() for m in wn_layers(model)]
    assert all(o.any() for o in before)
    with frozen_bn_stats(model):
        assert not any(m.track_running_stats for m in wn_layers(model))
        torch.testing.assert_close(model(x), want)
    assert all(torch.equal(m.running_mean, o) for m,o in zip(wn_layers(model), before))
    assert all(m.track_running_stats for m in wn_layers(model))
    model(x)
    assert not any(torch.equal(m.running_mean, o) for m,o in zip(wn_layers(model), before))

@pytest.mark.parametrize('n', [0, 1])
def test_training_on_one_value_per_channel_is_refused(n):
    model = narrow(noise=0.)
    with pytest.raises(ValueError, match='larger batches'): model(images(n))
    assert model.eval()(images(n)).shape == (n, 10)


# -- conv13 -------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 12), st.integers(1, 100), st.integers(1, 4))
def test_conv13_count_formula(width, classes, c):
    total, i = 0, c
    for f,k,*_ in CONV13:
        total += i*f*width*k*k + 2*f*width
        i = f*width
    assert n_params(conv13(classes, c, width=width)) == total + i*classes + 2*classes

def test_conv13_published_counts():
    assert n_params(conv13()) == 3_121_812 and n_params(conv13(100)) == 3_133_512

def test_conv13_layer_by_layer():
    "The table of the paper, written down with torch's functions"
    model, x = narrow(noise=0., dropout=0.), images(size=32)
    def layer(m, h, pad):
        w = m.g.view(-1, 1, 1, 1)*m.v/m.v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        t = F.conv2d(h, w, padding=pad)
        return F.leaky_relu(t - t.mean((0, 2, 3), keepdim=True) + m.bias.view(-1, 1, 1), .1)
    h, b = 2*x - 1, model.body
    for m in wn_layers(model): nn.init.normal_(m.bias, generator=seeded(3))
    for m in (b.conv1, b.conv2, b.conv3): h = layer(m, h, 1)
    h = F.max_pool2d(h, 2)
    for m in (b.conv4, b.conv5, b.conv6): h = layer(m, h, 1)
    h = F.max_pool2d(h, 2)
    for m in (b.conv7, b.conv8, b.conv9): h = layer(m, h, 0)
    assert h.shape == (16, 4, 6, 6)
    t = h.mean((2, 3)) @ (model.head.g[:, None]*F.normalize(model.head.v)).T
    torch.testing.assert_close(model(x), t - t.mean(0) + model.head.bias, rtol=1e-4, atol=1e-5)

def test_conv13_parts_and_order():
    model, x = narrow().eval(), images()
    assert [n for n,_ in model.named_children()] == ['norm', 'body', 'head']
    assert isinstance(model.body[0], InputNoise) and model.head.in_features == 4
    torch.testing.assert_close(model.head(model.body(model.norm(x))), model(x))
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [type(m) for m in drops] == [nn.Dropout]*2 and {m.p for m in drops} == {.5}
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {.1}
    assert {m.momentum for m in wn_layers(model)} == {.001}

@pytest.mark.parametrize('size', [(12, 12), (13, 19), (32, 32)])
def test_conv13_sizes(size):
    assert narrow()(torch.rand(2, 3, *size)).shape == (2, 10)

def test_noise_and_dropout_come_from_torchs_generator_in_training_only():
    model, x = narrow(), images()
    out = []
    for s in (0, 0, 1):
        torch.manual_seed(s)
        out.append(model(x))
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    model.eval()
    before = torch.get_rng_state()
    assert torch.equal(model(x), model(x)) and torch.equal(torch.get_rng_state(), before)

def test_conv13_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = narrow(), narrow(), narrow(generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.head.v, b.head.v) and not torch.equal(a.head.v, c.head.v)
    wide = conv13(generator=seeded())
    for m in wn_layers(wide):
        assert abs(m.v.std()/.05 - 1) < .05 and m.g.eq(1).all() and not m.bias.any() and not m.running_mean.any()
    for p in a.parameters(): p.data.add_(1)
    init_weights(a, generator=seeded())
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))

def test_conv13_copies_and_files(tmp_path):
    m, x = narrow(), images()
    m(x)
    want, f = m.eval()(x), tmp_path/'m.pth'
    assert torch.equal(copy.deepcopy(m)(x), want) and torch.equal(pickle.loads(pickle.dumps(m))(x), want)
    torch.save(m.state_dict(), f)
    other = conv13(width=4).eval()
    other.load_state_dict(torch.load(f, weights_only=True))
    torch.testing.assert_close(other(x), want)
    assert 'running_mean' in {k.rpartition('.')[2] for k in m.state_dict()}

@pytest.mark.parametrize('training', [False, True])
def test_conv13_memory_format_and_bf16(training):
    model, x = data_init(narrow(noise=0., dropout=0.), images(), seeded()).train(training), images(seed=2)
    fresh = lambda: copy.deepcopy(model)
    want = fresh()(x)
    cl = fresh().to(memory_format=torch.channels_last)
    torch.testing.assert_close(cl(x.to(memory_format=torch.channels_last)), want, rtol=1e-3, atol=1e-4)
    m = fresh()
    with torch.autocast('cpu', dtype=torch.bfloat16): y = m(x)
    assert y.dtype == torch.bfloat16 and {o.running_mean.dtype for o in wn_layers(m)} == {torch.float32}
    assert (y.float() - want).square().mean() < .01*want.square().mean()
    if training:
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert fresh().to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16

def test_the_mean_is_summed_in_float32():
    "In bfloat16 a sum of 40,000 ones would stop at 256"
    t = torch.ones(4, 1, 100, 100, dtype=torch.bfloat16)
    y, m = mean_only_bn(t, torch.zeros(1))
    assert m.dtype == torch.float32 and m.item() == 1 and y.dtype == torch.bfloat16 and not y.any()

def test_conv13_gets_gradients_and_learns():
    model = data_init(narrow(noise=.05, dropout=0., in_channels=1), images(c=1), seeded())
    x, y = images(32, 1), torch.arange(32) % 2
    x[y == 1, :, :8] *= .3
    opt, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    torch.manual_seed(0)
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        opt.step(); opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < .5*losses[0]


# -- data-dependent initialisation --------------------------------------------------------------
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 999), st.sampled_from([0., .15]), st.sampled_from([0., .5]), st.integers(12, 18))
def test_data_init_makes_every_preactivation_zero_mean_unit_std(seed, noise, dropout, size):
    model, x, seen = narrow(noise=noise, dropout=dropout), images(24, size=size, seed=seed), []
    keep = lambda m, args, y: seen.append(y.transpose(0, 1).flatten(1).clone()) # the activation is in place
    hooks = [m.register_forward_hook(keep) for m in wn_layers(model)]
    data_init(model, x, seeded(seed))
    for h in hooks: h.remove()
    assert len(seen) == 10
    for y in seen:
        torch.testing.assert_close(y.mean(1), torch.zeros(len(y)), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(1, correction=0), torch.ones(len(y)), rtol=1e-3, atol=0)

def test_data_init_leaves_no_trace_but_the_weights():
    model, x = narrow(), images()
    model(x)
    model.eval(); model.body.drop3.train()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k,v in model.named_buffers()}
    assert data_init(model, x) is model
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k,v in model.named_buffers())
    assert not any(m._forward_pre_hooks for m in wn_layers(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not m.bias.any() and abs(m.v.std()/.05 - 1) < .4 for m in wn_layers(model))

def test_data_init_generators():
    "With a generator nothing else decides, and torch's own is left alone; without one, torch's decides"
    params = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()])
    x, before = images(), torch.get_rng_state()
    a = params(data_init(narrow(), x, seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(params(data_init(narrow(generator=seeded(8)), x, seeded(5))), a)
    assert not torch.equal(params(data_init(narrow(), x, seeded(6))), a)
    out = []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        out.append(params(data_init(narrow(), x)))
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])

def test_data_init_names_the_layer_and_cleans_up():
    flat = torch.full((4, 3, 16, 16), .3)
    model = nn.Sequential(WeightNormConv2d(3, 2, 1), nn.LeakyReLU())
    with pytest.raises(ValueError, match="layer '0'"): data_init(model, flat, seeded())
    assert not model[0]._forward_pre_hooks and model[0].training
    one = narrow(noise=0., dropout=0.).eval()
    with pytest.raises(ValueError, match="layer 'head'"): data_init(one, images(1), seeded())
    assert not one.training and not one.head._forward_pre_hooks
    bad = images()
    bad[0] = math.nan
    with pytest.raises(ValueError, match="body.conv1"): data_init(narrow(), bad, seeded())


# -- what is done to the input ------------------------------------------------------------------
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6))

@settings(deadline=None, max_examples=25)
@given(shapes, st.integers(0, 99), st.floats(.1, 1), st.floats(0, .5), st.floats(1, 100))
def test_per_image_normalisation_properties(shape, seed, a, b, scale):
    x = torch.rand(shape, generator=seeded(seed)).double()
    p, g = per_image_normalize(x), global_contrast_normalize(x, scale)
    flat, ones = p.flatten(1), torch.ones(len(x)).double()
    torch.testing.assert_close(flat.mean(1), 0*ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(flat.square().mean(1), ones)
    torch.testing.assert_close(g.flatten(1).norm(dim=1), scale*ones)
    torch.testing.assert_close(per_image_normalize(a*x + b), p, rtol=1e-6, atol=1e-6) # brightness and contrast go
    torch.testing.assert_close(per_image_normalize(x[:1]), p[:1]) # images do not see each other

@pytest.mark.parametrize('f', [per_image_normalize, global_contrast_normalize, PerImageNorm(), GCN(55)])
@pytest.mark.parametrize('value', [0., .1, 1/3, 1.])
def test_constant_images_give_zeros_and_finite_gradients(f, value):
    x = torch.full((2, 3, 32, 32), value)
    x[1, 0, 0, 0] += 1/255 # the smallest contrast that bytes can have
    y = f(x.requires_grad_())
    y.square().sum().backward()
    assert not y[0].any() and x.grad.isfinite().all()
    assert y[1].isfinite().all() and y[1].any()

def test_bytes_and_floats_agree():
    x = torch.randint(0, 256, (6, 3, 5, 5), generator=seeded(), dtype=torch.uint8)
    for f in (PerImageNorm(), GCN(), ZCA.fit(x), ZCA.fit(x, 'mean_teacher')):
        torch.testing.assert_close(f(x), f(x.float()/255))
        assert f(x, torch.Generator()).dtype == torch.float32 and f(x[:0]).shape == (0, 3, 5, 5)
        half = f((x.float()/255).to(torch.bfloat16))
        assert half.dtype == torch.float32 and half.isfinite().all()

def correlated(n=2000, c=2, size=3, seed=0):
    "Full-rank images whose pixels depend on each other"
    d = c*size*size
    mix = torch.randn(d, d, generator=seeded(seed)).double()/d + torch.eye(d).double()*.3
    return (.5 + .1*torch.randn(n, d, generator=seeded(seed+1)).double() @ mix).view(n, c, size, size)

@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 99))
def test_zca_whitens(c, size, seed):
    x = correlated(c=c, size=size, seed=seed)
    z = ZCA.fit(x, eps=1e-9)
    white = z(x.float()).double().flatten(1)
    torch.testing.assert_close(white.T @ white/len(x), torch.eye(white.shape[1]).double(), rtol=0, atol=5e-3)
    torch.testing.assert_close(white.mean(0), torch.zeros(white.shape[1]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.matrix, z.matrix.T, rtol=1e-4, atol=1e-4)

def test_zca_of_the_other_style_whitens_what_gcn_made():
    x = correlated()
    z = ZCA.fit(x, 'mean_teacher', eps=1e-6)
    rows = z(x.float()).double().flatten(1)
    values = torch.linalg.eigvalsh(rows.T @ rows/(len(x) - 1))
    assert values[0].abs() < 1e-2 # the mean of each image is gone, and with it one direction
    torch.testing.assert_close(values[1:], torch.ones(len(values) - 1).double(), rtol=0, atol=1e-2)

@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.floats(1e-4, 1), st.integers(0, 99))
def test_zca_matrix_is_the_inverse_root(d, eps, seed):
    a = torch.randn(d, d, generator=seeded(seed)).double()
    w, cov = zca_matrix(a @ a.T, eps), a @ a.T + eps*torch.eye(d).double()
    torch.testing.assert_close(w @ cov @ w, torch.eye(d).double(), rtol=0, atol=1e-6)

@given(st.integers(1, 7), st.integers(0, 1))
def test_chunks_change_nothing(size, ddof):
    x = correlated(20)
    mean, cov = mean_cov(x.split(size), lambda o: o.flatten(1), ddof)
    torch.testing.assert_close(mean, x.flatten(1).mean(0))
    torch.testing.assert_close(cov, x.flatten(1).T.cov(correction=ddof))

def test_zca_is_deterministic_and_independent_of_order():
    x = correlated(100)
    a, b = ZCA.fit(x), ZCA.fit(x.flip(0))
    torch.testing.assert_close(a.matrix, b.matrix, rtol=1e-4, atol=1e-4)
    assert torch.equal(ZCA.fit(x).matrix, a.matrix)

def test_zca_stays_in_float32_under_autocast():
    x = correlated().float()
    z = ZCA.fit(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = z(x)
    assert torch.equal(y, z(x))

def test_zca_as_step_of_an_augmentation_and_as_norm():
    x = get_digits().train.x[:64]
    z = ZCA.fit(x)
    step = Compose(z, RandomFlip(), RandomCrop(1))
    assert torch.equal(step(x, seeded(3)), Compose(RandomFlip(), RandomCrop(1))(z(x), seeded(3)))
    for make in (lambda n: small_cnn(normalize=n), lambda n: wide_resnet(in_channels=1, normalize=n, **tiny)):
        net = make(z).eval()
        torch.testing.assert_close(net(x.float()/255), net.head(net.body(z(x))))
        assert net.norm is not z and net.norm.matrix.data_ptr() != z.matrix.data_ptr()
        other = make(ZCA(torch.zeros(1, 8, 8), torch.eye(64))).eval()
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(x.float()/255), net(x.float()/255))
    big = F.interpolate(x.float()/255, scale_factor=2)
    net = conv13(in_channels=1, width=4, normalize=ZCA.fit(big)).eval()
    assert torch.equal(pickle.loads(pickle.dumps(net))(big), net(big))
    assert not any('norm' in n for n,_ in net.named_parameters())

@pytest.mark.parametrize('f, error, words', [
    (lambda: conv13(width=0), ValueError, ['width=0']),
    (lambda: conv13(width=1.5), ValueError, ['width=1.5']),
    (lambda: conv13(n_classes=0, width=2), ValueError, ['n_classes=0']),
    (lambda: conv13(width=2, noise=-.1), ValueError, ['sigma=-0.1']),
    (lambda: narrow()(images(size=8)), ValueError, ['8x8', '12x12', 'small_cnn']),
    (lambda: narrow()(torch.rand(2, 3, 11, 40)), ValueError, ['11x40']),
    (lambda: narrow()(images(c=1)), ValueError, ['1 channel', 'in_channels=3']),
    (lambda: narrow()(images()[0]), ValueError, ['(B,C,H,W)']),
    (lambda: WeightNormLinear(0, 3), ValueError, ['(3, 0)']),
    (lambda: InputNoise(math.nan), ValueError, ['sigma=nan']),
    (lambda: data_init(small_cnn(), images(c=1)), ValueError, ['WeightNorm']),
    (lambda: GCN(0), ValueError, ['scale=0']),
    (lambda: per_image_normalize(torch.rand(3, 8, 8)), ValueError, ['(B,C,H,W)']),
    (lambda: per_image_normalize(torch.zeros(2, 3, 8, 8, dtype=torch.int64)), TypeError, ['int64']),
    (lambda: ZCA.fit(images(1)), ValueError, ['1 image', 'at least 2']),
    (lambda: ZCA.fit(images(), 'pca'), ValueError, ["'pca'", 'laine', 'mean_teacher']),
    (lambda: ZCA.fit(images(4, 1, 3), eps=0), ValueError, ['eps=0']),
    (lambda: ZCA.fit(images()[0]), ValueError, ['(B,C,H,W)']),
    (lambda: ZCA.fit(images(4, 1, 3))(images(4, 1, 4)), ValueError, ['(1, 4, 4)', '(1, 3, 3)']),
    (lambda: ZCA(torch.zeros(9), torch.eye(9)), ValueError, ['(9,)', '(C,H,W)']),
    (lambda: ZCA(torch.zeros(1, 3, 3), torch.eye(8)), ValueError, ['(8, 8)']),
])
def test_bad_input_of_conv13_and_input_treatments(f, error, words):
    with pytest.raises(error) as e: f()
    assert all(w in str(e.value) for w in words), e.value


# -- the networks of BC-learning ----------------------------------------------------------------
# name: (how to build a tiny one, the shape of a picture or clip that it takes)
BC_NETS = dict(conv11=(lambda **kw: conv11(**{**dict(size=16, width=.1, fc=16, generator=seeded()), **kw}), (3, 16, 16)),
               conv10=(lambda **kw: conv10(**{**dict(width=.1, generator=seeded()), **kw}), (3, 16, 16)),
               envnet=(lambda **kw: envnet(**{**dict(T=6000, width=.25, fc=16, generator=seeded()), **kw}), (1, 1, 6000)),
               envnet_v2=(lambda **kw: envnet_v2(**{**dict(T=23642, width=.3, fc=16, generator=seeded()), **kw}),
                          (1, 1, 23642)))
each_bc = pytest.mark.parametrize('make, shape', BC_NETS.values(), ids=BC_NETS)
NETS = BC_NETS | dict(cifar_resnet18=(lambda **kw: cifar_resnet18(**{**dict(width=.1, generator=seeded()), **kw}), (3, 16, 16)))
each_net = pytest.mark.parametrize('make, shape', NETS.values(), ids=NETS)
signals = lambda shape, n=4, seed=1: torch.rand(n, *shape, generator=seeded(seed))*2 - 1
convs_of = lambda model: [m for m in model.modules() if isinstance(m, nn.Conv2d)]
dense_of = lambda model: [m for m in model.modules() if isinstance(m, nn.Linear)]

def without_dropout(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    return model

def test_bc_published_counts():
    assert [n_params(conv11(k)) for k in (10, 100)] == [7_582_154, 7_674_404]
    assert n_params(conv10()) == 1_925_258
    with torch.device('meta'):
        assert [n_params(envnet(k)) for k in (50, 10)] == [48_560_638, 48_396_758]
        assert [n_params(envnet_v2(k)) for k in (50, 10)] == [101_251_186, 101_087_306]

@settings(deadline=None, max_examples=20)
@given(st.floats(.001, .4), st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40))
def test_bc_picture_networks_of_any_width(width, classes, channels, eighths, fc):
    "Counts added up by hand, and a forward pass, at any width, number of classes, channels and size"
    a, b, c = (max(1, round(f*width)) for f in (64, 128, 256))
    size, x = 8*eighths, signals((channels, 8*eighths, 8*eighths), 2)
    conv = lambda i, o, bias: 9*i*o + bias*o + 2*o
    m11 = conv11(classes, channels, size, width, fc)
    total = conv(channels, a, 0) + conv(a, a, 0) + conv(a, b, 0) + conv(b, b, 0) + conv(b, c, 0) + 3*conv(c, c, 0)
    total += (c*eighths**2 + 1)*fc + (fc + 1)*fc + (fc + 1)*classes
    assert n_params(m11) == total and m11(x).shape == (2, classes)
    m10 = conv10(classes, channels, width)
    total = sum(conv(i, o, 1) + 2*conv(o, o, 1) for i,o in ((channels, a), (a, b), (b, c)))
    assert n_params(m10) == total + (c + 1)*classes and m10(x).shape == (2, classes)

@settings(deadline=None, max_examples=15)
@given(st.sampled_from([ENVNET, ENVNET_V2]), st.integers(0, 50_000), st.floats(.3, 2), st.integers(1, 30))
def test_envnet_map_is_what_the_layers_make(spec, more, width, classes):
    T = envnet_least(spec)[1] + more
    with torch.device('meta'):
        model = (envnet if spec is ENVNET else envnet_v2)(classes, T, width, 8)
        x = torch.empty(2, 1, 1, T)
        i = [n for n,_ in model.body.named_children()].index('flat')
        assert model.body[:i](x).shape[1:] == envnet_map(spec, T, width)
        assert model(x).shape == (2, classes)

@pytest.mark.parametrize('make, spec', [(envnet, ENVNET), (envnet_v2, ENVNET_V2)])
def test_envnet_least_is_the_least(make, spec):
    rows, T = envnet_least(spec)
    kw = dict(width=rows/spec['conv2'][0], fc=4)
    with torch.device('meta'):
        model = make(T=T, **kw)
        i = [n for n,_ in model.body.named_children()].index('flat')
        assert model.body[:i](torch.empty(1, 1, 1, T)).shape[2:] == (1, 1)
    for bad in (dict(kw, T=T-1), dict(kw, T=T, width=(rows - 1)/spec['conv2'][0])):
        with pytest.raises(ValueError): make(**bad)

@pytest.mark.parametrize('f, shape, layers, eps, momentum, names', [
    (lambda: conv11(), (3, 32, 32), 11, 1e-5, .1,
     'block1 pool1 block2 pool2 block3 pool3 flat fc4 fc5'),
    (lambda: conv10(), (3, 32, 32), 10, 1e-3, .01, 'block1 pool1 block2 pool2 block3 pool flat'),
    (lambda: envnet(), (1, 1, 24014), 7, 2e-5, .1, 'conv1 conv2 pool2 swap conv3 pool3 conv4 pool4 flat fc5 fc6'),
    (lambda: envnet_v2(), (1, 1, 66650), 13, 2e-5, .1, 'conv1 conv2 pool2 swap conv3 conv4 pool4 conv5 conv6 pool6 '
     'conv7 conv8 pool8 conv9 conv10 pool10 flat fc11 fc12')])
def test_bc_names_and_constants(f, shape, layers, eps, momentum, names):
    "Other pages reach stages by these names"
    with torch.device('meta' if shape[1] == 1 else 'cpu'): model = f()
    assert [n for n,_ in model.named_children()] == ['norm', 'body', 'head']
    assert [n for n,_ in model.body.named_children()] == names.split()
    assert len(convs_of(model)) + len(dense_of(model)) == layers
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in bns} == {(eps, momentum)} and len(bns) == len(convs_of(model))
    assert {m.bias is None for m in convs_of(model)} == {layers != 10}
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == ([] if layers == 10 else [.5, .5])
    if layers in (10, 11): assert {m.padding for m in convs_of(model)} == {(1, 1)}
    else: assert {m.padding for m in convs_of(model)} == {(0, 0)}
    pools = {type(m) for n,m in model.body.named_children() if n.startswith('pool')}
    assert pools == ({nn.AvgPool2d, nn.AdaptiveAvgPool2d} if layers == 10 else {nn.MaxPool2d})

@each_bc
def test_bc_initial_distributions(make, shape):
    name = next(n for n,(m, _) in BC_NETS.items() if m is make)
    model = make(width=1., **({} if name == 'conv10' else dict(fc=256)))
    for m in convs_of(model) + dense_of(model):
        w, area = m.weight, m.weight[0, 0].numel()
        i, o = w.shape[1]*area, w.shape[0]*area
        law = {'conv10': 'glorot'}.get(name, 'he' if area > 1 or isinstance(m, nn.Conv2d) else
                                       'fan_in' if name == 'conv11' else 'lecun')
        std = dict(he=math.sqrt(2/i), lecun=math.sqrt(1/i), fan_in=math.sqrt(1/3/i), glorot=math.sqrt(2/(i + o)))[law]
        if w.numel() > 10_000: assert abs(w.std()/std - 1) < .03 and abs(w.mean()) < .03*std
        if w.numel() > 10_000: assert (w.abs().max() <= math.sqrt(3)*std*1.0001) == (law in ('fan_in', 'glorot'))
        assert m.bias is None or not m.bias.any()

@each_net
def test_nets_gradients_reach_every_parameter(make, shape):
    model = without_dropout(make())
    model(signals(shape, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # a bias right before a BatchNorm has a gradient of zero up to rounding
    assert all(p.grad.any() for n,p in model.named_parameters() if n.endswith('weight'))

@each_net
def test_nets_seeds(make, shape):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = make(), make(), make(generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    sa, sb, sc = (m.state_dict() for m in (a, b, c))
    assert all(torch.equal(sa[k], sb[k]) for k in sa)
    assert not any(torch.equal(sa[n], sc[n]) for n,p in a.named_parameters() if p.ndim > 1)
    torch.manual_seed(3); d = make(generator=None)
    torch.manual_seed(3); e = make(generator=None)
    assert torch.equal(d.head.weight, e.head.weight) and not torch.equal(d.head.weight, a.head.weight)

@each_net
def test_nets_evaluation_is_deterministic_and_dropout_follows_torchs_generator(make, shape):
    model, x, out = make(), signals(shape), []
    for s in (0, 0, 1):
        torch.manual_seed(s)
        out.append(model(x))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2]) == (not any(isinstance(m, nn.Dropout) for m in model.modules()))
    model.eval()
    before = torch.get_rng_state()
    y = model(x)
    assert torch.equal(model(x), y) and torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-4, atol=1e-5) # rows do not see each other

@each_net
def test_nets_memory_format_bf16_and_compile(make, shape):
    model, x = make(), signals(shape)
    for _ in range(3): model(x) # running statistics other than 0 and 1
    model.eval()
    want = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=.1, atol=.1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16
    torch._dynamo.reset() # earlier tests count towards the limit of recompilations
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)

@each_net
def test_nets_stages_are_reached_by_name(make, shape):
    "Every stage has one output that a hook may replace, and that no later layer writes into"
    model, x, mixed = without_dropout(make()), signals(shape), torch.tensor([3, 2, 1, 0])
    stages = ['norm'] + [f'body.{n}' for n,_ in model.body.named_children()]
    for name in stages:
        seen = []
        def swap(m, args, y):
            seen.append((y, y.clone()))
            return y.flip(0)
        hook = model.get_submodule(name).register_forward_hook(swap)
        y = model(x)
        hook.remove()
        torch.testing.assert_close(y, model(x)[mixed], rtol=1e-3, atol=1e-4)
        assert len(seen) == 1 and torch.equal(*seen[0])

@each_net
def test_nets_copies_and_files(make, shape, tmp_path):
    m, x, f = make(), signals(shape), tmp_path/'m.pth'
    m(x)
    want = m.eval()(x)
    assert torch.equal(copy.deepcopy(m)(x), want) and torch.equal(pickle.loads(pickle.dumps(m))(x), want)
    torch.save(m.state_dict(), f)
    other = make(generator=seeded(9)).eval()
    other.load_state_dict(torch.load(f, weights_only=True))
    torch.testing.assert_close(other(x), want)

def test_conv11_layer_by_layer():
    "The table of the paper, written down with torch's functions"
    m, x = without_dropout(BC_NETS['conv11'][0]()), signals((3, 16, 16))
    h, b = x, m.body
    for block in (b.block1, b.block2, b.block3):
        for o in block: h = F.relu(F.batch_norm(F.conv2d(h, o.conv.weight, padding=1), None, None, training=True, eps=1e-5))
        h = F.max_pool2d(h, 2)
    h = h.flatten(1)
    for o in (b.fc4.fc, b.fc5.fc): h = F.relu(h @ o.weight.T)
    torch.testing.assert_close(m(x), h @ m.head.weight.T, rtol=1e-4, atol=1e-5)

def test_envnet_layer_by_layer():
    m, x = without_dropout(BC_NETS['envnet'][0]()), signals((1, 1, 6000))
    b, h = m.body, x
    layer = lambda h, o: F.relu(F.batch_norm(F.conv2d(h, o.conv.weight), None, None, training=True, eps=2e-5))
    h = F.max_pool2d(layer(layer(h, b.conv1), b.conv2), (1, 160))
    h = torch.stack([h[:, c, 0] for c in range(10)], 1)[:, None] # channel c is row c
    h = F.max_pool2d(layer(F.max_pool2d(layer(h, b.conv3), 3), b.conv4), (1, 3)).flatten(1)
    for o in (b.fc5.fc, b.fc6.fc): h = F.relu(h @ o.weight.T)
    torch.testing.assert_close(m(x), h @ m.head.weight.T, rtol=1e-4, atol=1e-5)

def test_bc_pictures_come_as_given_or_normalised():
    x = signals((3, 16, 16))
    for make in (BC_NETS['conv11'][0], BC_NETS['conv10'][0]):
        assert torch.equal(make().norm(x), x)
        torch.testing.assert_close(make(normalize=([.1, .2, .3], 2.)).eval()(x),
                                   make().eval()((x - torch.tensor([.1, .2, .3]).view(3, 1, 1))/2), rtol=1e-4, atol=1e-5)
        assert isinstance(make(normalize=PerImageNorm()).norm, PerImageNorm)

def test_draw_weights_resets_everything():
    model = conv11(size=8, width=.1, fc=8, generator=seeded())
    want = copy.deepcopy(model.state_dict())
    model(signals((3, 8, 8)))
    for p in model.parameters(): p.data.add_(1)
    assert draw_weights(model, 'he', 'fan_in', seeded()) is model
    assert all(torch.equal(v, want[k]) for k,v in model.state_dict().items())

@pytest.mark.parametrize('f, error, words', [
    (lambda: conv11(size=28), ValueError, ['size=28', 'multiple of 8']),
    (lambda: conv11(size=0), ValueError, ['size=0']),
    (lambda: conv11(width=0), ValueError, ['width=0']),
    (lambda: conv10(width=math.nan), ValueError, ['width=nan']),
    (lambda: conv10(width=math.inf), ValueError, ['width=inf']),
    (lambda: conv10(0), ValueError, ['n_classes=0']),
    (lambda: conv11(fc=1.5), ValueError, ['fc=1.5']),
    (lambda: conv11(in_channels=0), ValueError, ['in_channels=0']),
    (lambda: BC_NETS['conv11'][0]()(signals((3, 32, 32))), ValueError, ['32x32', '16x16', 'another size']),
    (lambda: BC_NETS['conv11'][0]()(signals((3, 16, 24))), ValueError, ['16x24', '16x16']),
    (lambda: BC_NETS['conv10'][0]()(signals((3, 3, 9))), ValueError, ['3x9', '4x4 and larger']),
    (lambda: BC_NETS['conv10'][0]()(signals((1, 8, 8))), ValueError, ['1 channel', 'in_channels=3']),
    (lambda: BC_NETS['conv10'][0]()(torch.zeros(2, 3, 8, 8).byte()), TypeError, ['uint8']),
    (lambda: envnet(T=100), ValueError, ['T=100', '5294']),
    (lambda: envnet(T=0), ValueError, ['T=0']),
    (lambda: envnet(n_classes=-1), ValueError, ['n_classes=-1']),
    (lambda: envnet(width=.1), ValueError, ['width=0.1', '4 rows', '10 are needed', '0.25']),
    (lambda: envnet_v2(width=.2), ValueError, ['width=0.2', '19 are needed', '0.297']),
    (lambda: envnet_v2(width=-1), ValueError, ['width=-1']),
    (lambda: CheckWaves(10)(torch.rand(2, 2, 1, 10)), ValueError, ['mono', '2 channels', '(B,1,1,10)']),
    (lambda: CheckWaves(10)(torch.rand(2, 1, 1, 9)), ValueError, ['9 samples', 'T=10', 'T=9']),
    (lambda: CheckWaves(10)(torch.rand(2, 10)), ValueError, ['(2, 10)', '(B,1,1,10)', 'view']),
    (lambda: CheckWaves(10)(torch.rand(2, 1, 10)), ValueError, ['(2, 1, 10)']),
    (lambda: CheckWaves(10)(torch.rand(2, 1, 2, 10)), ValueError, ['(2, 1, 2, 10)']),
    (lambda: CheckWaves(10)(torch.zeros(2, 1, 1, 10, dtype=torch.int16)), TypeError, ['int16', '32768']),
    (lambda: draw_weights(conv10(width=.1), 'kaiming', 'he'), ValueError, ["'kaiming'", 'lecun']),
])
def test_bad_input_of_the_networks_of_bc_learning(f, error, words):
    with pytest.raises(error) as e: f()
    assert all(w in str(e.value) for w in words), e.value


# -- the ResNet-18 of auxiliary training ---------------------------------------------------------
resnet = NETS['cifar_resnet18'][0]

@settings(deadline=None, max_examples=15)
@given(st.floats(.01, .3), st.integers(1, 30), st.integers(1, 4), st.integers(2, 33), st.booleans())
def test_resnet_of_any_width_and_size(width, classes, channels, size, relu):
    "Counts added up by hand, and a forward pass"
    fs = [max(1, round(f*width)) for f in (64, 128, 256, 512)]
    model, conv = resnet(n_classes=classes, in_channels=channels, width=width, relu=relu), lambda i, o, k: k*k*i*o + 2*o
    total, c = conv(channels, fs[0], 3), fs[0]
    for i,f in enumerate(fs):
        total += conv(c, f, 3) + 3*conv(f, f, 3) + (conv(c, f, 1) if i else 0)
        c = f
    assert n_params(model) == total + (c + 1)*classes
    assert model(signals((channels, size, size), 2)).shape == (2, classes)

def test_resnet_with_one_channel_per_stage_keeps_its_strides():
    "Equal channels are no reason to drop a shortcut's stride"
    model = resnet(width=.001)
    assert [tuple(b.shortcut.conv.stride) for b in (model.body.layer2[0], model.body.layer4[0])] == [(2, 2)]*2
    assert model.body[:5](signals((3, 32, 32))).shape == (4, 1, 4, 4)

def test_resnet_names_and_constants():
    "Other pages reach stages by these names"
    model = resnet()
    assert [n for n,_ in model.named_children()] == ['norm', 'body', 'head']
    assert [n for n,_ in model.body.named_children()] == 'stem layer1 layer2 layer3 layer4 pool flat'.split()
    assert [n for n,_ in model.body.stem.named_children()] == ['conv', 'bn']
    assert [n for n,_ in resnet(relu=True).body.stem.named_children()] == ['conv', 'bn', 'act']
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in bns} == {(1e-5, .1)} and len(bns) == len(convs_of(model)) == 20
    assert not any(m.bias is not None for m in convs_of(model))
    strides = [[b.first.conv.stride[0] for b in model.body.get_submodule(f'layer{i}')] for i in (1, 2, 3, 4)]
    assert strides == [[1, 1], [2, 1], [2, 1], [2, 1]]

def test_resnet_initial_distributions():
    model = cifar_resnet18(generator=seeded())
    for m in convs_of(model):
        std = math.sqrt(2/(m.out_channels*m.kernel_size[0]**2))
        if m.weight.numel() > 10_000: assert abs(m.weight.std()/std - 1) < .03 and abs(m.weight.mean()) < .03*std
    for w in model.head.parameters():
        assert 0 < w.abs().max() <= 512**-.5 * 1.0001
        assert abs(w.std()*math.sqrt(3*512) - 1) < (.02 if w.ndim > 1 else .2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): assert m.weight.eq(1).all() and not m.bias.any()

@pytest.mark.parametrize('c_out, stride', [(4, 1), (6, 1), (4, 2), (6, 2)])
def test_basic_block_against_the_formula_and_torchvision(c_out, stride):
    from torchvision.models.resnet import BasicBlock as Other
    ours = draw_weights(BasicBlock(4, c_out, stride), 'he_out', 'torch', seeded())
    for m in ours.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.bias, generator=seeded(2))
    short = (c_out, stride) != (4, 1)
    other = Other(4, c_out, stride, nn.Sequential(nn.Conv2d(4, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)) if short
                  else None)
    other.load_state_dict(dict(zip(other.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(3, 4, 9, 9, generator=seeded(1))
    keep, y = x.clone(), ours(x)
    torch.testing.assert_close(y, other(x))
    layer = lambda x, m, **kw: F.batch_norm(F.conv2d(x, m.conv.weight, **kw), None, None, m.bn.weight, m.bn.bias, True)
    h = layer(F.relu(layer(x, ours.first, stride=stride, padding=1)), ours.second, padding=1)
    h = h + (layer(x, ours.shortcut, stride=stride) if short else x)
    torch.testing.assert_close(y, F.relu(h))
    assert torch.equal(x, keep) and y.min() == 0 # the in-place activation must not touch the input

def test_resnet_normalisation():
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in CIFAR_MEAN_STD)
    x = torch.rand(2, 3, 4, 4, generator=seeded())
    torch.testing.assert_close(resnet().norm(x), (x - mean)/std)
    for c in (1, 2, 4): torch.testing.assert_close(resnet(in_channels=c).norm(torch.zeros(1, c, 2, 2)), -torch.ones(1, c, 2, 2))
    assert torch.equal(resnet(normalize=(0, 1)).norm(x), x)
    assert isinstance(resnet(normalize=PerImageNorm()).norm, PerImageNorm)

@pytest.mark.parametrize('f, error, words', [
    (lambda: cifar_resnet18(0), ValueError, ['n_classes=0']),
    (lambda: cifar_resnet18(2.5), ValueError, ['n_classes=2.5']),
    (lambda: cifar_resnet18(in_channels=0), ValueError, ['in_channels=0']),
    (lambda: cifar_resnet18(width=0), ValueError, ['width=0']),
    (lambda: cifar_resnet18(width=-1), ValueError, ['width=-1']),
    (lambda: cifar_resnet18(width=math.nan), ValueError, ['width=nan']),
    (lambda: resnet(in_channels=1, normalize=CIFAR_MEAN_STD), ValueError, ['3 entries', 'in_channels=1']),
    (lambda: resnet()(signals((1, 8, 8))), ValueError, ['1 channel', 'in_channels=3']),
    (lambda: resnet()(torch.zeros(2, 3, 8, 8).byte()), TypeError, ['uint8']),
])
def test_resnet_bad_input(f, error, words):
    with pytest.raises(error) as e: f()
    assert all(w in str(e.value) for w in words), e.value
