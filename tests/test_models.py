"Networks: what the page `02_models` cannot say in passing."
import copy, math, pickle
from dataclasses import replace

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from ssl_notes.models import (STYLES, NormalizeInput, PreActBlock, SameConv2d, WRNStyle, get_style,
                              init_weights, n_params, same_padding, small_cnn, wide_resnet)

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
