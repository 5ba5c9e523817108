"CTAugment: every operation against Pillow, the table against a loop, seeds, checkpoints, devices and bad input."
import copy, io, math, pickle

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ssl_notes import ctaugment as cta
from ssl_notes.ctaugment import (CTA_OPS, PUBLISHED, VALUES, CTAOp, CTAugment, bin_chances, bin_of, blur, cta_filter, level_of,
                                 pick, proximity, rescale, segment_chances, smooth, towards, update_rates)
from ssl_notes.randaugment import invert

from helpers import images, seeded   # one thread, too

quick = settings(deadline=None, max_examples=25)
sizes = dict(c=st.sampled_from([1, 3]), h=st.integers(1, 40), w=st.integers(1, 40), seed=st.integers(0, 9999),
             kind=st.sampled_from(['noise', 'narrow', 'few', 'two', 'flat', 'ramp']))
levels = st.floats(0, 1)
WAYS = [getattr(Image.Resampling, o) for o in ('LANCZOS', 'BICUBIC', 'BILINEAR', 'BOX', 'HAMMING', 'NEAREST')]


# -- Pillow, as the published code calls it ---------------------------------------------------------
def mixed(f): return lambda im, l: Image.blend(im, f(im), l)
def filtered(f): return mixed(lambda im: im.filter(f))
def enhanced(f): return lambda im, l: f(im).enhance(.1 + 1.9*l)
def moved(coefficients): return lambda im, l: im.transform(im.size, Image.Transform.AFFINE, coefficients((2*l - 1)*.3, *im.size))

def pil_rescale(im, l, l2, pixels=False):
    (w, h), s = im.size, .25*l
    box = (s, s, w - s, h - s) if pixels else (s*w, s*h, w*(1 - s), h*(1 - s))
    return im.crop(box).resize(im.size, WAYS[int(5.99*l2)])

PILLOW = dict(
    auto_contrast=mixed(ImageOps.autocontrast), blur=filtered(ImageFilter.BLUR), brightness=enhanced(ImageEnhance.Brightness),
    color=enhanced(ImageEnhance.Color), contrast=enhanced(ImageEnhance.Contrast), equalize=mixed(ImageOps.equalize),
    invert=mixed(ImageOps.invert), identity=lambda im, *l: im, posterize=lambda im, l: ImageOps.posterize(im, 1 + int(7.999*l)),
    rescale=pil_rescale, rotate=lambda im, l: im.rotate(int(np.round((2*l - 1)*45))), sharpness=enhanced(ImageEnhance.Sharpness),
    shear_x=moved(lambda s, w, h: (1, s, 0, 0, 1, 0)), shear_y=moved(lambda s, w, h: (1, 0, 0, s, 1, 0)),
    smooth=filtered(ImageFilter.SMOOTH), solarize=lambda im, l: ImageOps.solarize(im, int(255.999*l)),
    translate_x=moved(lambda s, w, h: (1, 0, s*w, 0, 1, 0)), translate_y=moved(lambda s, w, h: (1, 0, 0, 0, 1, s*h)))
PIXEL = dict(translate_x=moved(lambda s, w, h: (1, 0, s, 0, 1, 0)), translate_y=moved(lambda s, w, h: (1, 0, 0, 0, 1, s)),
             rescale=lambda im, l, l2: pil_rescale(im, l, l2, pixels=True))
TIES = ['rotate', 'shear_x', 'shear_y', 'rescale', 'translate_x', 'translate_y']

def pillow(x, f, l):
    "Image by image, with levels (B,n)"
    out = []
    for im,o in zip(x, l):
        a = np.asarray(f(Image.fromarray((im[0] if len(im) == 1 else im.permute(1, 2, 0)).contiguous().numpy()), *o))
        out.append(torch.tensor(a)[None] if a.ndim == 2 else torch.tensor(a).permute(2, 0, 1))
    return torch.stack(out)

def call(name, x, l, t=None, place=None):
    "An operation with a row of levels for each image; the hole in the middle"
    t, (h, w) = t or CTAugment(1), x.shape[2:]
    l = torch.tensor([(*o, 0., 0.)[:2] for o in l], dtype=torch.float64).view(len(x), 1, 2)
    cy, cx = place or (torch.full((len(x), 2), h//2), torch.full((len(x), 2), w//2))
    return t.apply(x, torch.full((len(x), 1), list(t.ops).index(name)), l, cy, cx)

def n_levels(name): return len(CTA_OPS[name].bins)

@pytest.mark.parametrize('name', PILLOW)
@quick
@given(l=st.lists(st.tuples(levels, levels), min_size=3, max_size=3), **sizes)
def test_pillow_at_any_level(name, c, h, w, seed, kind, l):
    "One level per image, all exact"
    x, l = images(3, c, h, w, seed, kind), [o[:n_levels(name)] for o in l]
    got, want = call(name, x, l), pillow(x, PILLOW[name], l)
    # An angle, slope or cut may meet a tie between two neighbours, which a last bit decides
    if name in TIES: assert (got != want).float().mean() <= .02
    else: assert torch.equal(got, want)

@pytest.mark.parametrize('name', PILLOW)
@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 8, 8), (3, 33, 50), (1, 48, 30), (3, 96, 96)], ids=str)
def test_pillow_at_the_bins_of_both_rules(name, shape):
    "The middle and the ends of 17 bins and of 16 segments"
    k = np.r_[(np.arange(17) + .5)/17, np.arange(17)/16]
    if shape[1] == 96: k = k[::4]
    l = [(o, (i % 6)/5) for i,o in enumerate(k.tolist())]
    x = images(1, *shape).expand(len(l), -1, -1, -1)
    l = [o[:n_levels(name)] for o in l]
    assert torch.equal(call(name, x, l), pillow(x, PILLOW[name], l))

@pytest.mark.parametrize('size', [(1, 1), (1, 7), (2, 2), (3, 3), (4, 9), (5, 5), (64, 48)], ids=str)
@pytest.mark.parametrize('c', [1, 3])
def test_pillow_at_small_and_large_sizes(size, c):
    x = images(4, c, *size)
    for name,f in PILLOW.items():
        l = [(o, o)[:n_levels(name)] for o in (0., .3, .62, 1.)]
        assert torch.equal(call(name, x, l), pillow(x, f, l)), name

@pytest.mark.parametrize('way', range(6))
@pytest.mark.parametrize('n', [3, 6, 12, 24, 48, 96, 27, 40])
def test_every_cut_and_way(n, way):
    "All stretches that a side can be cut to, where factors of three make ties"
    cuts = range(n//4 + 1)
    x = images(1, 1, n, 7, seed=n)
    for k in cuts:
        box = (0, k, 7, n - k)
        want = torch.tensor(np.asarray(Image.fromarray(x[0, 0].numpy()).crop(box).resize((7, n), WAYS[way])))
        lo, hi = torch.tensor([float(k)]).double(), torch.tensor([float(n - k)]).double()
        m = cta.resample(n, lo, hi, torch.tensor([way]))
        got = ((m @ x[0].double() + 2**21) / 2**22).floor().clamp(0, 255)[0]
        assert torch.equal(got, want.double()), (n, k)

@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 8, 8), (3, 20, 31)], ids=str)
def test_the_hole(shape):
    "Half the side each way from the centre, clipped, grey 127"
    x, (h, w), g = images(20, *shape), shape[1:], seeded(4)
    l = torch.rand(20, 1, generator=g).double()
    cy, cx = torch.randint(h, (20, 2), generator=g), torch.randint(w, (20, 2), generator=g)
    got, want = call('cutout', x, l.tolist(), place=(cy, cx)), x.clone()
    for b in range(20):
        half, r, c = (1 + int(l[b].item()*min(h, w)*.499))//2, cy[b, 0].item(), cx[b, 0].item()
        want[b, :, max(0, r - half):r + half, max(0, c - half):c + half] = 127
    assert torch.equal(got, want)

@pytest.mark.parametrize('rule', PUBLISHED)
@quick
@given(l=st.lists(st.tuples(levels, levels), min_size=2, max_size=2), **sizes)
def test_published_no_ops(rule, c, h, w, seed, kind, l):
    x, t = images(2, c, h, w, seed, kind), CTAugment(1, rule=rule, published=True)
    for name in PUBLISHED[rule]:
        row = [o[:n_levels(name)] for o in l]
        assert torch.equal(call(name, x, row, t), x) and torch.equal(pillow(x, PIXEL[name], row), x)

def test_published_touches_nothing_else():
    for rule,n in (('bins', 2), ('segments', 3)):
        t = CTAugment(rule=rule, published=True)
        assert [k for k in CTA_OPS if t.ops[k] != CTA_OPS[k]] == [k for k in CTA_OPS if k in PUBLISHED[rule]] and len(PUBLISHED[rule]) == n
    own = CTAOp(invert, (), ())
    assert CTAugment(published=True, ops=CTA_OPS | dict(rescale=own)).ops['rescale'] == own
    assert list(CTAugment(published=True, ops=['invert']).ops) == ['invert']


# -- every operation --------------------------------------------------------------------------------
@pytest.mark.parametrize('name', CTA_OPS)
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided', 'one image expanded'])
def test_layout(name, channels, layout):
    x, l = images(c=channels), [(k/6, 1 - k/6) for k in range(6)]
    if layout == 'one image expanded': x = x[:1].expand(6, -1, -1, -1)
    plain, keep = x.contiguous(), x.clone()
    if layout == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if layout == 'strided': x = torch.stack([x, x], -1)[..., 0]
    y = call(name, x, l)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, keep) and torch.equal(y, call(name, plain, l))

@pytest.mark.parametrize('name', CTA_OPS)
def test_rows_are_independent(name):
    x, l = images(kind='narrow'), [(k/6, 1 - k/6) for k in range(6)]
    y = call(name, x, l)
    for i in range(6): assert torch.equal(call(name, x[i:i+1], l[i:i+1]), y[i:i+1])

@pytest.mark.parametrize('f', [smooth, blur, lambda x: rescale(x, .2, 1), lambda x: towards(x, .3, invert)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_go_through_bytes(f, dtype):
    x = (images(kind='narrow').double()/255).to(dtype)
    y, want = f(x), f((x*255).round().byte())
    assert y.dtype == dtype and torch.allclose(y.double(), want.double()/255, atol=1/255)

@pytest.mark.parametrize('bad, says', [(torch.zeros(1, 2, 8, 8), '2 channels'), (torch.zeros(1, 8, 8), r'x\[None\]')])
def test_refused_pictures(bad, says):
    t = CTAugment()
    for f in (smooth, blur, lambda x: rescale(x, .1), lambda x: towards(x, .1, invert), t, t.probe):
        with pytest.raises(ValueError, match=says): f(bad)

def test_refused_values():
    x = images()
    for f,says in ((lambda: rescale(x, .26), 'inset from'), (lambda: rescale(x, -.1), 'inset from'), (lambda: rescale(x, .1, 7), 'method from'),
                   (lambda: rescale(x, torch.zeros(4)), r'inset has shape \(4,\)'), (lambda: towards(x, math.nan, invert), 'factor from nan')):
        with pytest.raises(ValueError, match=says): f()
    with pytest.raises(TypeError, match='int32'): blur(x.int())


# -- the equations ----------------------------------------------------------------------------------
def loop(m, used, omega, decay):
    m = m.clone()
    for k,w in zip(used.flatten().tolist(), omega.flatten().tolist()):
        if k >= 0: m.view(-1)[k] = decay*m.view(-1)[k] + (1 - decay)*w
    return m

@quick
@given(rows=st.integers(1, 5), n=st.integers(1, 17), uses=st.integers(0, 200), decay=st.sampled_from([0., .3, .9, .99, 1.]), seed=st.integers(0, 999))
def test_update_is_the_loop(rows, n, uses, decay, seed):
    g = seeded(seed)
    m, omega = torch.rand(rows, n, generator=g).double(), torch.rand(uses, generator=g).double()
    used = torch.randint(-1, rows*n, (uses,), generator=g)
    keep, got = m.clone(), update_rates(m, used, omega, decay)
    assert (got - loop(m, used, omega, decay)).abs().max() < 1e-13 and torch.equal(m, keep)
    assert got.min() >= 0 and got.max() <= 1 + 1e-12

def test_one_bin_used_by_all():
    "Order counts: the last answer weighs most"
    m, used = torch.ones(1).double(), torch.zeros(5).long()
    omega = torch.tensor([0., 0, 0, 0, 1]).double()
    first, last = update_rates(m, used, omega.flip(0), .5), update_rates(m, used, omega, .5)
    assert last.item() == .5**5 + .5 and first.item() == .5**5 + .5**5

@pytest.mark.parametrize('omega, n, want', [(1., 1, 1.), (.5, 1, .995), (0., 1, .99), (0., 10, .904382075), (0., 50, .605006067), (0., 100, .366032341)])
def test_rates_by_hand(omega, n, want):
    got = update_rates(torch.ones(1).double(), torch.zeros(n).long(), torch.full((n,), omega))
    assert abs(got.item() - want) < 1e-9

def test_twenty_three_failures():
    t = CTAugment(1)
    k = list(t.weights()).index('rotate')*17 + 3
    for n in range(1, 24):
        t.update(torch.tensor([[k, -1]]), torch.zeros(1))
        assert (t.chances()['rotate'] > 0).sum() == (17 if n < 23 else 16), n
    assert abs(t.weights()['rotate'][3] - .7936) < 1e-4

@quick
@given(m=st.lists(st.floats(0, 1), min_size=2, max_size=17), threshold=levels, pad=st.integers(0, 3))
def test_filter_and_chances(m, threshold, pad):
    m = torch.tensor(m, dtype=torch.float64)
    p = cta_filter(m, threshold)
    assert p.max() == 1 and ((p == 0) | (p >= threshold)).all() and (p[m == m.max()] == 1).all()
    bins, segments = bin_chances(p), segment_chances(p)
    assert abs(bins.sum() - 1) < 1e-12 and abs(segments.sum() - 1) < 1e-12 and len(segments) == len(m) - 1
    padded = cta_filter(torch.cat([m, m.new_full((pad,), -math.inf)]), threshold)
    assert torch.equal(padded[:len(m)], p) and not padded[len(m):].any()

@quick
@given(c=st.lists(st.floats(0, 1), min_size=1, max_size=17).filter(lambda c: sum(c) > .01), u=st.floats(0, 1, exclude_max=True))
def test_pick(c, u):
    c = torch.tensor(c, dtype=torch.float64)
    k = pick(c, torch.tensor(u, dtype=torch.float64)).item()
    run = c.cumsum(0)
    assert c[k] > 0 and run[k] > u*run[-1] and (k == 0 or run[k-1] <= u*run[-1])

@quick
@given(l=levels, n=st.integers(1, 17))
def test_bins(l, n):
    assert bin_of(torch.tensor(l, dtype=torch.float64), n) == int(l * n * .999)

def test_proximity():
    p = torch.randn(40, 7, generator=seeded()).softmax(1)
    y = torch.arange(40) % 7
    assert torch.allclose(proximity(p, y), p.gather(1, y[:, None])[:, 0], atol=1e-6)
    sure = torch.eye(7)[y]*(1 + 1e-6) # sums that rounding left above 1
    assert proximity(sure, y).max() <= 1 and proximity(sure, (y + 1) % 7).min() >= 0
    assert torch.equal(proximity(p, torch.eye(7)[y]), proximity(p, y))
    for bad in (y[:5], y[:, None], torch.eye(7)[y, :6]):
        with pytest.raises(ValueError, match='classes'): proximity(p, bad)


# -- the whole --------------------------------------------------------------------------------------
VARIANTS = [CTAugment(), CTAugment(rule='bins', cutout=1.), CTAugment(3, rule='bins', published=True),
            CTAugment(1, ops=['posterize', 'rescale', 'identity']), CTAugment(published=True, cutout=.4)]

def learned(t, seed=0):
    "Rates of every size"
    t = copy.deepcopy(t)
    t.rates = torch.where(t.rates.isinf(), t.rates, torch.rand(t.rates.shape, generator=seeded(seed)).double())
    return t

@pytest.mark.parametrize('t', VARIANTS, ids=repr)
@pytest.mark.parametrize('shape', [(64, 3, 32, 32), (32, 1, 8, 8), (16, 3, 9, 14), (8, 3, 1, 1), (0, 3, 8, 8)], ids=str)
def test_types_shapes_and_seeds(t, shape):
    t, x = learned(t), images(*shape)
    keep, before = x.clone(), torch.get_rng_state()
    y, (z, used) = t(x, seeded()), t.probe(x, seeded())
    assert (y.shape, y.dtype, z.shape, z.dtype) == (x.shape, x.dtype)*2 and torch.equal(x, keep)
    assert (used.shape, used.dtype) == ((len(x), 2*t.depth), torch.int64)
    assert torch.equal(t(x, seeded()), y) and torch.equal(t.probe(x, seeded())[1], used)
    assert torch.equal(torch.get_rng_state(), before)
    f = t(x.float()/255, seeded())
    assert f.dtype == torch.float32 and torch.equal((f*255).round().byte(), y)

def test_global_generator():
    t, x = CTAugment(), images(16)
    torch.manual_seed(3); a = t(x)
    torch.manual_seed(3); b = t(x)
    assert torch.equal(a, b) and not torch.equal(t(x), a)

@pytest.mark.parametrize('t', VARIANTS, ids=repr)
def test_as_many_draws_whatever_the_rates(t):
    "The generator stands at the same place afterwards, so a resumed run draws the same"
    x, states = images(8), []
    for u in (t, learned(t), learned(t, 1)):
        g = seeded(); u(x, g); states.append(g.get_state())
        g = seeded(); u.probe(x, g); states.append(g.get_state())
    assert all(torch.equal(s, states[0]) for s in states)

@pytest.mark.parametrize('rule', PUBLISHED)
def test_levels_follow_the_rates(rule):
    t = learned(CTAugment(rule=rule))
    op, u, v, _, _ = t.params(300_000, 1, 1, 1, seeded())
    level, row = t.levels(op, u, v), t._row(op)
    assert level.min() >= 0 and level.max() < 1
    for k,(name, p) in enumerate(t.chances().items()):
        want = segment_chances(p) if rule == 'segments' else bin_chances(p)
        got = (level[row == k]*len(want)).floor().long().bincount(minlength=len(want))
        assert (got/got.sum() - want).abs().max() < .015, name

def test_used_names_the_bins_of_the_probe():
    t = CTAugment()
    x, g = images(4000, 1, 2, 2), seeded(2)
    op, level, *_ = t.params(*x.shape, seeded(2))
    _, used = t.probe(x, g)
    names, first = list(t.weights()), dict(zip(t.weights(), range(19)))
    for (b, s) in np.ndindex(200, 2):
        name = list(t.ops)[op[b, s]]
        want = [(first[name] + k)*17 + int(level[b, s, k].item()*n*.999) for k,n in enumerate(t.ops[name].bins)]
        assert used[b, 2*s:2*s+2].tolist() == (want + [-1, -1])[:2]
    counts = used[used >= 0].bincount(minlength=19*17).view(19, 17)
    for k,(name, m) in enumerate(t.weights().items()):
        assert not counts[k, len(m):].any() and counts[k, :len(m)].min() > 0, name
    assert (used[:, ::2] < 0).float().mean() == pytest.approx(1/19, abs=.01)

def test_probe_has_no_last_hole():
    x = images(200, 3, 32, 32, kind='narrow')
    a, b = (CTAugment(1, cutout=c, ops=['identity']) for c in (0., 1.))
    assert torch.equal(a(x, seeded()), x) and torch.equal(b.probe(x, seeded())[0], x)
    holes = (b(x, seeded()) != x).any(1).sum((1, 2))
    assert holes.max() <= 256 and holes.min() >= 64 and (b.probe(x, seeded())[1] == -1).all()

def test_update_touches_what_was_used():
    t, x = CTAugment(), images(30)
    _, used = t.probe(x, seeded())
    before, omega = t.rates, torch.rand(30, generator=seeded())
    t.update(used, omega)
    want = loop(before, used, omega.double()[:, None].expand(-1, 4), .99)
    inside = before.isfinite()
    assert (t.rates - want)[inside].abs().max() < 1e-14 and torch.equal(t.rates.isfinite(), inside)
    assert t.rates.dtype == torch.float64 and not t.rates.requires_grad

def test_update_keeps_no_graph():
    t, x = CTAugment(), images(4)
    w = torch.rand(4, requires_grad=True)
    t.update(t.probe(x, seeded())[1], w.sigmoid())
    assert not t.rates.requires_grad

@pytest.mark.parametrize('rule', PUBLISHED)
def test_dropped_bins_are_not_drawn_and_can_come_back(rule):
    t = CTAugment(1, rule=rule, ops=['rotate'])
    t.rates[0, 9:] = .1
    op, u, v, *_ = t.params(5000, 1, 1, 1, seeded())
    highest = t.levels(op, u, v)[..., 0].max()
    assert highest < (9/16 if rule == 'segments' else 9/17) and highest > .5
    used = torch.tensor([[12, -1]])
    for _ in range(200): t.update(used, torch.ones(1))
    assert t.chances()['rotate'][12] > 0 and not t.chances()['rotate'][13]

def test_finds_a_limit():
    t, x, g = CTAugment(1, ops=['invert', 'rotate', 'posterize']), torch.zeros(128, 1, 2, 2), seeded()
    for _ in range(60):
        _, used = t.probe(x, g)
        k, row = used[:, 0] % 17, used[:, 0] // 17
        t.update(used, ((row == 0) & (k <= 5) | (row == 1) & (k - 8).abs().le(3) | (row == 2) & (k >= 2)).double())
    kept = {k: (c > 0).nonzero().flatten().tolist() for k,c in t.chances().items()}
    assert kept == dict(invert=[*range(6)], rotate=[*range(5, 12)], posterize=[*range(2, 8)])


# -- checkpoints and devices ------------------------------------------------------------------------
@pytest.mark.parametrize('t', VARIANTS, ids=repr)
def test_state_and_exact_resume(t):
    t, x, g = learned(t), images(32), seeded()
    fresh = CTAugment(t.depth, rule=t.rule, cutout=t.cutout, published=t.published, ops=list(t.ops))
    def step(t, g):
        y, (_, used) = t(x, g), t.probe(x, g)
        t.update(used, torch.rand(32, generator=g))
        return y
    step(t, g)
    buffer = io.BytesIO()
    torch.save(dict(t=t.state_dict(), g=g.get_state()), buffer)
    want = [step(t, g) for _ in range(3)]
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh.load_state_dict(state['t']); g.set_state(state['g'])
    assert all(torch.equal(a, step(fresh, g)) for a in want) and torch.equal(fresh.rates, t.rates)

def test_state_is_a_copy():
    t, other = CTAugment(), CTAugment()
    state = t.state_dict()
    other.load_state_dict(state)
    t.update(t.probe(images(8), seeded())[1], torch.zeros(8))
    assert torch.equal(state['rates'], CTAugment().rates) and torch.equal(other.rates, state['rates'])
    other.rates[0, 0] = .5
    assert state['rates'][0, 0] == 1

@pytest.mark.parametrize('state', [
    CTAugment(ops=['invert', 'rotate']).state_dict(), CTAugment(ops=list(CTA_OPS)[::-1]).state_dict(),
    CTAugment(ops=CTA_OPS | dict(invert=CTAOp(invert, (9,), ('level',)))).state_dict(), dict(rates=torch.ones(19, 17)),
    dict(CTAugment().state_dict(), rates=torch.ones(19, 16))], ids=['fewer', 'order', 'bins', 'no names', 'shape'])
def test_foreign_states(state):
    t = CTAugment()
    before = t.rates.clone()
    with pytest.raises(ValueError, match='rates have shape|other operations or bins'): t.load_state_dict(state)
    assert torch.equal(t.rates, before)

@pytest.mark.parametrize('t', VARIANTS, ids=repr)
def test_survives_pickle_and_copy(t):
    t, x = learned(t), images(32, 1, 8, 8)
    for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):
        assert repr(other) == repr(t) and torch.equal(other(x, seeded()), t(x, seeded()))
        assert torch.equal(other.probe(x, seeded())[0], t.probe(x, seeded())[0])

@pytest.mark.parametrize('t', VARIANTS, ids=repr)
def test_a_step_reads_nothing_from_the_device(t):
    "The meta device has no values: whatever looked at one would fail"
    t, x = copy.deepcopy(t), images(32).to('meta')
    y, (z, used) = t(x, seeded()), t.probe(x, seeded())
    t.update(used, torch.rand(32, device='meta'))
    assert {o.device.type for o in (y, z, used, t.rates)} == {'meta'} and y.shape == z.shape == x.shape


# -- arguments --------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw, says', [
    (dict(depth=0), 'depth=0'), (dict(depth=1.5), 'depth=1.5'), (dict(depth=None), 'depth=None'), (dict(depth='2'), "depth='2'"),
    (dict(threshold=-.1), 'threshold=-0.1'), (dict(threshold=1.01), 'threshold=1.01'), (dict(threshold=math.nan), 'threshold=nan'),
    (dict(decay=2), 'decay=2'), (dict(decay=-1), 'decay=-1'), (dict(rule='segment'), "rule='segment'"), (dict(rule=None), 'rule=None'),
    (dict(cutout=16), 'cutout=16'), (dict(ops=[]), 'ops is empty'), (dict(ops={}), 'ops is empty'), (dict(ops='invert'), 'ops='),
    (dict(ops=['flip']), "no operation 'flip'"), (dict(ops=dict(a=CTAOp(invert, (1,)))), '2 or more bins'),
    (dict(ops=dict(a=CTAOp(invert, (5, 5)))), r'bins=\(5, 5\)'), (dict(ops=dict(a=CTAOp(invert, (5,)*3, ('level',)*3))), 'at most two')])
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says): CTAugment(**kw)

@pytest.mark.parametrize('used, omega, says', [
    ((0, 4), (0,), 'B at least 1'), ((3, 4), (2,), r'used has shape \(3, 4\)'), ((3, 2), (3,), r'give \(B,4\)'), ((3,), (3,), r'\(3,\)'),
    ((3, 4), (3, 1), r'omega \(3, 1\)'), ((3, 4), (), r'omega \(\)')])
def test_bad_updates(used, omega, says):
    t = CTAugment()
    with pytest.raises(ValueError, match=says): t.update(torch.zeros(used).long(), torch.zeros(omega))
    assert torch.equal(t.rates, CTAugment().rates)

@pytest.mark.parametrize('w', [-.1, 1.5, math.nan, math.inf])
def test_bad_proximities(w):
    t = CTAugment()
    with pytest.raises(ValueError, match='omega from'): t.update(torch.zeros(2, 4).long(), torch.tensor([.5, w]))
    assert torch.equal(t.rates, CTAugment().rates)

def test_positions_of_another_table():
    with pytest.raises(ValueError, match='outside of the table'): CTAugment(ops=['invert']).update(torch.full((2, 4), 17), torch.ones(2))

def test_own_operations_and_values():
    def shift(l, h, w): return 10*l
    t = CTAugment(1, rule='bins', ops=dict(a=CTAOp(lambda x, v: x + v.view(-1, 1, 1, 1).byte(), (1,), (shift,)), b=CTAOp(torch.clone, (), ())))
    x = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    y, (_, used) = t(x, seeded()), t.probe(x, seeded())
    assert 0 < y.max() < 10 and set(used.flatten().tolist()) == {-1, 0} and "ops=['a', 'b']" in repr(t)
    assert list(t.weights()) == ['a'] and list(CTAugment().weights())[9:11] == ['rescale', 'rescale 2']

def test_nineteen():
    assert len(CTA_OPS) == 19 and sum(len(o.bins) for o in CTA_OPS.values()) == 19
    assert all(v in VALUES for o in CTA_OPS.values() for v in o.value)
    only = CTAugment(2, ops=['identity'])
    assert only.rates.numel() == 0 and torch.equal(only(x := images(), seeded()), x) and only.chances() == {}
    only.update(only.probe(x, seeded())[1], torch.ones(6))
    assert level_of(torch.tensor(3), .5, 7) == .5
