"RandAugment: every operation against Pillow on random pictures; rows, seeds, limits and bad input."
import copy, math, pickle

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageEnhance, ImageOps

from ssl_notes.augment import WEAK, Compose, cutout
from ssl_notes.randaugment import (OPS, STRONG, Op, RandAugment, auto_contrast, brightness, color, contrast, equalize,
                                   invert, level_value, posterize, rotate, sharpness, shear_x, shear_y, solarize,
                                   strong_augment, translate_x, translate_y)

from helpers import images, seeded   # one thread, too

quick = settings(deadline=None, max_examples=40)
sizes = dict(c=st.sampled_from([1, 3]), h=st.integers(4, 40), w=st.integers(4, 40), seed=st.integers(0, 9999),
             kind=st.sampled_from(['noise', 'narrow', 'few', 'two', 'flat', 'ramp']))

def transform(*m):
    return lambda im, v: im.transform(im.size, Image.Transform.AFFINE, [v if o is None else o for o in m])
def enhance(name): return lambda im, v: getattr(ImageEnhance, name)(im).enhance(v)
PILLOW = dict(
    invert=lambda im, v: ImageOps.invert(im), auto_contrast=lambda im, v: ImageOps.autocontrast(im),
    equalize=lambda im, v: ImageOps.equalize(im), rotate=lambda im, v: im.rotate(v),
    posterize=lambda im, v: ImageOps.posterize(im, int(v)), solarize=lambda im, v: ImageOps.solarize(im, v),
    shear_x=transform(1, None, 0, 0, 1, 0), shear_y=transform(1, 0, 0, None, 1, 0),
    translate_x=transform(1, 0, None, 0, 1, 0), translate_y=transform(1, 0, 0, 0, 1, None),
    contrast=enhance('Contrast'), color=enhance('Color'), brightness=enhance('Brightness'), sharpness=enhance('Sharpness'))
# What other level tables may ask for, beyond UDA's
VALUES = dict(rotate=st.floats(-400, 400), posterize=st.integers(1, 8), solarize=st.integers(0, 256),
              shear_x=st.floats(-1.5, 1.5), shear_y=st.floats(-1.5, 1.5),
              translate_x=st.integers(-45, 45), translate_y=st.integers(-45, 45),
              **{k: st.floats(-.5, 3) for k in ('contrast', 'color', 'brightness', 'sharpness')})
GEOMETRY = ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y']
VALUED = list(VALUES)

def pillow(x, name, v):
    "Image by image, with a value for each"
    out = []
    for im,o in zip(x, v):
        a = np.asarray(PILLOW[name](Image.fromarray((im[0] if len(im) == 1 else im.permute(1, 2, 0)).contiguous().numpy()), o))
        out.append(torch.tensor(a)[None] if a.ndim == 2 else torch.tensor(a).permute(2, 0, 1))
    return torch.stack(out)

def call(name, x, v, **kw):
    "An operation by name; `cutout` in the middle"
    more = dict(cy=x.shape[2]//2, cx=x.shape[3]//2, fill=kw.get('fill', .5))
    return OPS[name].f(x, *([] if OPS[name].top is None else [v]), **{k: more[k] for k in OPS[name].takes})


# -- Pillow -------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', PILLOW)
@quick
@given(levels=st.lists(st.integers(0, 9), min_size=3, max_size=3), signs=st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3), **sizes)
def test_pillow_at_published_levels(name, c, h, w, seed, kind, levels, signs):
    "One value per image, all of them exact"
    x = images(3, c, h, w, seed, kind)
    v = level_value(name, torch.tensor(levels), torch.tensor(signs), min(h, w))
    got = OPS[name].f(x) if v is None else OPS[name].f(x, v)
    assert torch.equal(got, pillow(x, name, [None]*3 if v is None else v.tolist()))

@pytest.mark.parametrize('name', VALUES)
@quick
@given(data=st.data(), **sizes)
def test_pillow_at_any_value(name, c, h, w, seed, kind, data):
    x, v = images(2, c, h, w, seed, kind), [data.draw(VALUES[name]) for _ in range(2)]
    got, want = OPS[name].f(x, torch.tensor(v, dtype=torch.float64)), pillow(x, name, v)
    # An angle or slope may meet a tie between two neighbours, which a last bit decides
    if name in GEOMETRY: assert (got != want).float().mean() <= .02
    else: assert torch.equal(got, want)

@pytest.mark.parametrize('name', PILLOW)
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (2, 2), (2, 9), (3, 2), (3, 3), (64, 48)])
def test_pillow_at_small_and_large_sizes(name, size):
    x = images(4, 3, *size)
    v = level_value(name, torch.tensor([2, 4, 7, 9]), torch.tensor([1, -1, 1, -1]), min(size))
    got = OPS[name].f(x) if v is None else OPS[name].f(x, v)
    assert torch.equal(got, pillow(x, name, [None]*4 if v is None else v.tolist()))

@pytest.mark.parametrize('name', GEOMETRY)
def test_fill(name):
    "The empty part is `fill`, the rest as with black"
    x, v = images(kind='narrow'), 30 if name == 'rotate' else 3 if 'translate' in name else .3 # no black inside
    black, filled = OPS[name].f(x, v), OPS[name].f(x, v, fill=.5)
    assert (black == 0).any() and torch.equal(filled, torch.where(black == 0, 128, black))


# -- every operation ----------------------------------------------------------------------------
def some_value(name, b=6):
    "A value for each image, all different levels"
    v = level_value(name, torch.arange(1, b + 1), (-1)**torch.arange(b), 32)
    return v

@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided', 'one image expanded'])
def test_layout(name, channels, layout):
    x = images(c=channels)
    if layout == 'one image expanded': x = x[:1].expand(6, -1, -1, -1)
    plain, keep = x.contiguous(), x.clone()
    if layout == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if layout == 'strided': x = torch.stack([x, x], -1)[..., 0]
    y = call(name, x, some_value(name))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, keep) and torch.equal(y, call(name, plain, some_value(name)))

@pytest.mark.parametrize('name', OPS)
def test_rows_are_independent(name):
    x, v = images(kind='narrow'), some_value(name)
    y = call(name, x, v)
    for i in range(6): assert torch.equal(call(name, x[i:i+1], None if v is None else v[i].item()), y[i:i+1])

@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('b', [0, 1])
def test_empty_and_single(name, b):
    x = images()[:b]
    for v in (level_value(name, 3), level_value(name, torch.full((b,), 3))):
        assert call(name, x, v).shape == x.shape

@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_go_through_bytes(name, dtype):
    x, v = images(kind='narrow'), some_value(name)
    f = (x.double()/255).to(dtype)
    y, want = call(name, f, v), call(name, (f*255).round().byte(), v)
    assert y.dtype == dtype and y.min() >= 0 and y.max() <= 1
    assert torch.allclose(y.double(), want.double()/255, atol=1/255 if dtype != torch.float64 else 1e-12)

@quick
@given(**sizes)
def test_identities(c, h, w, seed, kind):
    x = images(3, c, h, w, seed, kind)
    assert torch.equal(invert(invert(x)), x)
    for f in (contrast, color, brightness, sharpness): assert torch.equal(f(x, 1), x)
    for f in (rotate, shear_x, shear_y, translate_x, translate_y): assert torch.equal(f(x, 0), x)
    assert torch.equal(rotate(x, 180), x.flip(2, 3)) and torch.equal(rotate(x, 360), x)
    assert torch.equal(solarize(x, 256), x) and torch.equal(solarize(x, 0), invert(x))
    assert torch.equal(posterize(x, 8), x) and not brightness(x, 0).any()
    assert not translate_x(x, w).any() and not translate_y(x, -h).any()
    once = auto_contrast(x)
    assert torch.equal(auto_contrast(once).byte(), once) or (once.int() - auto_contrast(once).int()).abs().max() <= 1
    if c == 1: assert torch.equal(color(x, .3), x)
    if kind == 'flat': assert torch.equal(equalize(x), x) and torch.equal(auto_contrast(x), x) and torch.equal(sharpness(x, 0), x)

@pytest.mark.parametrize('f, v, says', [
    (posterize, 0, 'bits from 0.0'), (posterize, 9, 'bits from 9.0'), (solarize, 257, 'threshold from 257.0'), (solarize, -1, 'threshold'),
    (brightness, math.nan, 'factor from nan'), (rotate, math.inf, 'degrees'), (contrast, torch.zeros(4), 'factor has shape (4,)'),
    (shear_x, torch.zeros(6, 1), 'coefficient has shape')])
def test_bad_values(f, v, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(').replace(')', r'\)')): f(images(), v)

@pytest.mark.parametrize('x, error, says', [
    (images()[0], ValueError, r'x\[None\]'), (images().int(), TypeError, 'int32'), (images(c=4), ValueError, '4 channels')])
def test_bad_images(x, error, says):
    for f in (invert, equalize, lambda x: rotate(x, 3), lambda x: sharpness(x, .5)):
        with pytest.raises(error, match=says): f(x)
    with pytest.raises(error, match=says): strong_augment('cifar')(x, seeded())


# -- levels -------------------------------------------------------------------------------------
@pytest.mark.parametrize('l', range(11))
def test_published_table(l):
    want = dict(rotate=int(30*l/10), posterize=4 - int(4*l/10), shear_x=.3*l/10, shear_y=.3*l/10, translate_x=int(10*l/10),
                translate_y=int(10*l/10), solarize=256 - int(256*l/10), cutout=int(20*l/10),
                **{k: .1 + 1.8*l/10 for k in ('contrast', 'color', 'brightness', 'sharpness')})
    for name in OPS:
        v = level_value(name, l)
        if name in want: assert v.item() == pytest.approx(want[name], abs=1e-12)
        else: assert v is None
    for name in GEOMETRY: assert level_value(name, l, -1) == -level_value(name, l)
    assert level_value('solarize', l, -1) == level_value('solarize', l)

@pytest.mark.parametrize('side, shift, hole', [(8, 1, 4), (32, 9, 18), (96, 27, 54)])
def test_pixels_scale_with_the_picture(side, shift, hole):
    assert (level_value('translate_y', 9, side=side), level_value('cutout', 9, side=side)) == (shift, hole)


# -- RandAugment --------------------------------------------------------------------------------
def loop(t, x, op, on, level, sign, cy, cx):
    "Image by image, slot by slot"
    x, ops, (h, w) = x.clone(), list(t.ops.values()), x.shape[2:]
    for b in range(len(x)):
        for s in range(t.n):
            if not on[b, s]: continue
            o, more = ops[op[b, s]], dict(fill=t.fill, cy=cy[b, s], cx=cx[b, s])
            v = level_value(o, level[b, s], sign[b, s], min(h, w))
            x[b] = o.f(x[b:b+1], *([] if v is None else [v.item()]), **{k: more[k] for k in o.takes})[0]
    return cutout(x, cy[:, -1], cx[:, -1], round(min(h, w)/2) if t.cutout is None else t.cutout, t.fill)

VARIANTS = [RandAugment(), RandAugment(3, 1.), RandAugment(1, .2, (5, 5), 0, ['rotate', 'cutout'], 0.), STRONG['digits'],
            RandAugment(0), RandAugment(p=0)]

@pytest.mark.parametrize('t', VARIANTS, ids=repr)
@pytest.mark.parametrize('shape', [(64, 3, 32, 32), (64, 1, 8, 8), (40, 3, 9, 20), (1, 3, 8, 8), (0, 3, 8, 8)])
def test_against_a_loop(t, shape):
    x, drawn = images(*shape), t.params(*shape, seeded(5))
    keep = x.clone()
    assert torch.equal(t.apply(x, *drawn), loop(t, x, *drawn)) and torch.equal(x, keep)
    assert torch.equal(t(x, seeded(5)), t.apply(x, *drawn))

@quick
@given(perm=st.permutations(range(12)), seed=st.integers(0, 99))
def test_images_do_not_see_each_other(perm, seed):
    "Permuted images with permuted draws are the permuted result; a single image alone is the same"
    t, x = RandAugment(p=.9), images(12)
    ps = t.params(*x.shape, seeded(seed))
    y = t.apply(x, *ps)
    assert all(len(p) == 12 for p in ps)
    assert torch.equal(t.apply(x[perm], *[p[perm] for p in ps]), y[perm])
    assert torch.equal(t.apply(x[2:3], *[p[2:3] for p in ps]), y[2:3])

@pytest.mark.parametrize('name', STRONG)
def test_seed_and_generator_state(name):
    x = images(16, 1, 8, 8) if name == 'digits' else images(16, 3, 32, 32)
    t, g, torchs = strong_augment(name), seeded(), torch.get_rng_state()
    a, state, b = t(x, g), g.get_state(), t(x, g)
    assert torch.equal(torch.get_rng_state(), torchs) and not torch.equal(a, b)
    assert torch.equal(t(x, seeded()), a)
    again = torch.Generator(); again.set_state(state)
    assert torch.equal(t(x, again), b)
    torch.manual_seed(4); c = t(x)
    torch.manual_seed(4); assert torch.equal(t(x), c)

@pytest.mark.parametrize('layout', ['channels_last', 'strided', 'one image expanded'])
def test_layout_of_the_whole(layout):
    x, t = images(32, 3, 16, 16), strong_augment('cifar')
    if layout == 'one image expanded': x = x[:1].expand(32, -1, -1, -1)
    plain, keep = x.contiguous(), x.clone()
    if layout == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if layout == 'strided': x = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(t(x, seeded()), t(plain, seeded())) and torch.equal(x, keep)

def test_floats_and_bytes_alike():
    x, t = images(32, 3, 16, 16), RandAugment(fill=.6) # 153 of 255
    assert torch.equal((t(x.float()/255, seeded())*255).round().byte(), t(x, seeded()))

def test_each_image_has_its_own_draw():
    assert len(strong_augment('cifar')(images(1, 3, 32, 32).expand(64, -1, -1, -1), seeded()).unique(dim=0)) == 64

@pytest.mark.parametrize('n, p, levels', [(2, .5, (1, 9)), (3, .2, (4, 4)), (1, 1, (0, 10))])
def test_frequencies(n, p, levels):
    op, on, level, sign, cy, cx = RandAugment(n, p, levels).params(20_000, 3, 7, 5, seeded())
    assert op.shape == on.shape == level.shape == sign.shape == (20_000, n) and cy.shape == cx.shape == (20_000, n + 1)
    for drawn,lo,hi in ((op, 0, 14), (level, *levels), (cy, 0, 6), (cx, 0, 4)):
        assert (drawn.min(), drawn.max()) == (lo, hi)
        share = drawn.flatten().bincount()[lo:].double()/drawn.numel()
        assert (share - 1/(hi - lo + 1)).abs().max() < .012
    assert abs(on.double().mean() - p) < .01 and abs(sign.double().mean()) < .03 and set(sign.flatten().tolist()) == {-1, 1}

def test_translate_and_fill_reach_the_operations():
    x = images(64, 3, 32, 32)//2 + 64 # neither black nor white
    t = RandAugment(1, 1., (10, 10), 0, ['translate_x'], fill=1., translate=3)
    white = (t(x, seeded()) == 255).all(1).sum((1, 2))
    assert (white == 3*32).all()
    one = RandAugment(0, cutout=4, fill=0.)(x, seeded())
    assert ((one == 0).all(1).sum((1, 2)) <= 16).all() and (one == 0).any()

def test_own_operations():
    blur = Op(sharpness, 1, -1)
    t = RandAugment(1, 1., (10, 10), 0, ops=dict(blur=blur))
    x = images()
    assert torch.equal(t(x, seeded()), sharpness(x, 0)) and "ops=['blur']" in repr(t)
    assert 'blur' not in OPS

@pytest.mark.parametrize('t', [*VARIANTS, strong_augment('svhn')], ids=repr)
def test_survives_pickle_and_copy(t):
    x = images(32, 1, 8, 8)
    for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):
        assert repr(other) == repr(t) and torch.equal(other(x, seeded()), t(x, seeded()))

@pytest.mark.parametrize('kw, says', [
    (dict(n=-1), 'n=-1'), (dict(n=1.5), 'n=1.5'), (dict(p=-.1), 'p=-0.1'), (dict(p=math.nan), 'p=nan'), (dict(levels=(0, 11)), 'levels='),
    (dict(levels=(5, 3)), 'levels='), (dict(levels=(.5, 3)), 'levels='), (dict(levels=3), 'levels=3'), (dict(cutout=-2), 'cutout=-2'),
    (dict(ops=[]), 'ops is empty'), (dict(ops=['blur']), "no operation named 'blur'"), (dict(ops='rotate'), 'ops='),
    (dict(fill=128), 'fill=128'), (dict(translate=-1), 'translate=-1'), (dict(n=None), 'n=None')])
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says): RandAugment(**kw)

def test_strong_is_randaugment_then_weak():
    for name in STRONG:
        t = strong_augment(name)
        assert isinstance(t, Compose) and t.ts == (STRONG[name], *WEAK[name])
    assert STRONG.keys() == WEAK.keys()
    with pytest.raises(ValueError, match="'stl10'"): strong_augment('imagenet')
