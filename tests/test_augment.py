"Augmentation: properties, and per-image references written as plain loops."
import math

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from ssl_notes.augment import (BatchTransform, Compose, Cutout, GaussianNoise, RandomAffine, RandomCrop,
                               RandomFlip, affine, cutout, gaussian_noise, hflip, reflect_crop, weak_augment)

torch.set_num_threads(1)
seeded = lambda s=0: torch.Generator().manual_seed(s)
def images(b=6, c=3, h=12, w=10, seed=0):
    return torch.randint(256, (b, c, h, w), dtype=torch.uint8, generator=seeded(seed))
sizes = dict(b=st.integers(1, 6), c=st.integers(1, 4), h=st.integers(2, 14), w=st.integers(2, 14), seed=st.integers(0, 999))
quick = settings(deadline=None, max_examples=50)
ALL = [RandomFlip(), RandomCrop(3), RandomAffine(), GaussianNoise(), Cutout(5), Compose(RandomFlip(), RandomCrop(2)),
       Compose(), weak_augment('cifar'), weak_augment('svhn'), weak_augment('digits')]
RANDOM = [t for t in ALL if isinstance(t, BatchTransform)]


# -- every transformation -----------------------------------------------------------------------
@pytest.mark.parametrize('t', ALL, ids=repr)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided', 'one image expanded'])
def test_contract(t, dtype, layout):
    "Same shape, type and device; the input is left alone; the seed decides; the layout does not matter"
    x = images() if dtype == torch.uint8 else (images().float()/255).to(dtype)
    if layout == 'one image expanded': x = x[:1].expand(6, -1, -1, -1)
    plain, keep = x.contiguous(), x.clone()
    if layout == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if layout == 'strided': x = torch.stack([x, x], -1)[..., 0]
    y = t(x, seeded())
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert torch.equal(x, keep) and torch.equal(y, t(plain, seeded()))

@pytest.mark.parametrize('t', ALL, ids=repr)
def test_default_generator(t):
    "Without a generator torch.manual_seed decides; with one, torch's own state is not touched"
    x = images()
    torch.manual_seed(1); a = t(x)
    torch.manual_seed(1); b = t(x)
    before = torch.get_rng_state(); c = t(x, seeded())
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(c, t(x, seeded()))

@pytest.mark.parametrize('t', RANDOM, ids=repr)
def test_call_is_params_then_apply(t):
    x = images()
    assert torch.equal(t(x, seeded(3)), t.apply(x, *t.params(*x.shape, seeded(3))))
    assert all(len(p) == len(x) for p in t.params(*x.shape, seeded(3)))

@pytest.mark.parametrize('t', RANDOM, ids=repr)
@quick
@given(perm=st.permutations(range(6)), seed=st.integers(0, 99))
def test_images_do_not_see_each_other(t, perm, seed):
    "Permuted images with permuted parameters are the permuted result; a single image alone is the same"
    x, ps = images(), t.params(6, 3, 12, 10, seeded(seed))
    y = t.apply(x, *ps)
    assert torch.equal(t.apply(x[perm], *[p[perm] for p in ps]), y[perm])
    assert torch.equal(t.apply(x[2:3], *[p[2:3] for p in ps]), y[2:3])

@pytest.mark.parametrize('t', [t for t in ALL if repr(t) != 'Compose()'], ids=repr)
def test_each_image_has_its_own_draw(t):
    x = images(1).expand(64, -1, -1, -1)
    assert len(t(x, seeded()).unique(dim=0)) >= (2 if isinstance(t, RandomFlip) else 8)

@pytest.mark.parametrize('t', [RandomFlip(), RandomCrop(3), Cutout(5)], ids=repr)
def test_bytes_and_floats_agree_exactly(t):
    x = images()
    got, want = t(x, seeded()), t(x.float()/255, seeded())
    if isinstance(t, Cutout): assert ((got.float()/255 - want).abs() < .002).all() # 128/255 for .5
    else: assert torch.equal(got.float()/255, want)

@pytest.mark.parametrize('t', [RandomAffine(), weak_augment('digits')], ids=repr)
def test_bytes_and_floats_agree_after_rounding(t):
    x = images()
    got, want = t(x, seeded()), t(x.float()/255, seeded())*255
    assert ((got.float() - want).abs() <= .501).all()

@pytest.mark.parametrize('t', ALL, ids=repr)
def test_an_empty_batch(t):
    assert t(images()[:0], seeded()).shape == (0, 3, 12, 10)

def test_compose_hands_the_generator_on():
    x, g = images(), seeded()
    want = RandomCrop(2)(RandomFlip()(x, g), g)
    assert torch.equal(Compose(RandomFlip(), RandomCrop(2))(x, seeded()), want)
    assert torch.equal(Compose(Compose(RandomFlip()), RandomCrop(2))(x, seeded()), want)


# -- flip ---------------------------------------------------------------------------------------
@quick
@given(**sizes)
def test_hflip_against_a_loop(b, c, h, w, seed):
    x, mask = images(b, c, h, w, seed), torch.rand(b, generator=seeded(seed)) < .5
    want = torch.stack([i.flip(-1) if m else i for i,m in zip(x, mask.tolist())])
    assert torch.equal(hflip(x, mask), want)
    assert torch.equal(hflip(hflip(x, mask), mask), x)

@pytest.mark.parametrize('p', [0, .2, .5, 1])
def test_flip_frequency(p):
    m, = RandomFlip(p).params(20_000, 3, 8, 8, seeded())
    assert abs(m.float().mean() - p) <= 4*math.sqrt(p*(1-p)/20_000)


# -- crop ---------------------------------------------------------------------------------------
@quick
@given(**sizes, data=st.data())
def test_reflect_crop_against_pad_and_slice(b, c, h, w, seed, data):
    pad = data.draw(st.integers(0, min(h, w) - 1))
    x, g = images(b, c, h, w, seed), seeded(seed)
    dy, dx = torch.randint(2*pad + 1, (2, b), generator=g)
    big = F.pad(x.float(), (pad,)*4, mode='reflect').byte()
    want = torch.stack([big[i, :, r:r+h, s:s+w] for i,(r,s) in enumerate(zip(dy.tolist(), dx.tolist()))])
    assert torch.equal(reflect_crop(x, dy, dx, pad), want)

@pytest.mark.parametrize('pad', [1, 4, 12])
def test_every_offset(pad):
    n = 2*pad + 1
    x = images(1, 3, 32, 32)
    big = F.pad(x.float(), (pad,)*4, mode='reflect').byte()[0]
    dy, dx = torch.cartesian_prod(torch.arange(n), torch.arange(n)).unbind(1)
    want = torch.stack([big[:, r:r+32, s:s+32] for r in range(n) for s in range(n)])
    assert torch.equal(reflect_crop(x.expand(n*n, -1, -1, -1), dy, dx, pad), want)
    assert len(want.unique(dim=0)) == n*n

@pytest.mark.parametrize('pad', [1, 4])
def test_offsets_are_uniform_and_independent(pad):
    "Pearson's statistic over all pairs of offsets; its mean is the number of cells less one"
    n = (2*pad + 1)**2
    dy, dx = RandomCrop(pad).params(500*n, 3, 32, 32, seeded())
    count = torch.bincount(dy*(2*pad + 1) + dx, minlength=n).float()
    assert len(count) == n and count.min() > 0
    chi2 = ((count - 500)**2 / 500).sum()
    assert abs(chi2 - (n - 1)) < 4*math.sqrt(2*(n - 1))


# -- affine -------------------------------------------------------------------------------------
@quick
@given(**sizes)
def test_affine_against_torchvision(b, c, h, w, seed):
    "Image by image; torchvision shifts by whole pixels only, so shifts are whole here"
    tv = pytest.importorskip('torchvision.transforms')
    g, x = seeded(seed), images(b, c, h, w, seed).float()/255
    angle, scale, _, _, shear = RandomAffine(90, 0, (.5, 2), 40).params(b, c, h, w, g)
    dx, dy = torch.randint(-3, 4, (2, b), generator=g)
    want = [tv.functional.affine(i, a, [p, q], s, [k, 0.], tv.InterpolationMode.BILINEAR)
            for i,a,s,p,q,k in zip(x, *(o.tolist() for o in (angle, scale, dx, dy, shear)))]
    torch.testing.assert_close(affine(x, angle, scale, dx, dy, shear), torch.stack(want), atol=1e-3, rtol=0)

@quick
@given(**sizes, data=st.data())
def test_affine_shift_by_whole_pixels(b, c, h, w, seed, data):
    dy, dx = data.draw(st.integers(1-h, h-1)), data.draw(st.integers(1-w, w-1))
    x = images(b, c, h, w, seed)
    want = torch.zeros_like(x)
    want[..., max(dy, 0):h+min(dy, 0), max(dx, 0):w+min(dx, 0)] = x[..., max(-dy, 0):h-max(dy, 0), max(-dx, 0):w-max(dx, 0)]
    assert torch.equal(affine(x, dx=dx, dy=dy), want)

def test_affine_against_a_loop_over_pixels():
    "Bilinear interpolation from the definition, for one image and one fractional shift, turn, zoom and shear"
    x, a, s, dx, dy, k = images(1, 1, 6, 7).float(), 20., 1.2, .3, -.7, 10.
    ca, sa, t = math.cos(math.radians(a)), math.sin(math.radians(a)), math.tan(math.radians(k))
    M = s*torch.tensor([[ca, -sa], [sa, ca]], dtype=torch.float64) @ torch.tensor([[1, -t], [0, 1]], dtype=torch.float64)
    inv, want, centre = M.inverse(), torch.zeros(6, 7), torch.tensor([3., 2.5], dtype=torch.float64)
    for i in range(6):
        for j in range(7):
            p = inv @ (torch.tensor([j, i]) - centre - torch.tensor([dx, dy])) + centre
            u, v = p.tolist()
            for r in (math.floor(v), math.floor(v) + 1):
                for q in (math.floor(u), math.floor(u) + 1):
                    if 0 <= r < 6 and 0 <= q < 7: want[i, j] += (1-abs(v-r))*(1-abs(u-q))*x[0, 0, r, q]
    torch.testing.assert_close(affine(x, a, s, dx, dy, k)[0, 0], want, atol=1e-2, rtol=0)

def test_affine_ranges():
    t = RandomAffine(10, .5, (.9, 1.2), 5)
    for p,(lo,hi) in zip(t.params(5000, 1, 8, 8, seeded()), ((-10, 10), (.9, 1.2), (-.5, .5), (-.5, .5), (-5, 5))):
        assert lo <= p.min() < lo + .01*(hi-lo) and hi - .01*(hi-lo) < p.max() <= hi
        assert abs(p.mean() - (lo+hi)/2) < .05*(hi-lo)

def test_affine_border():
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    assert affine(white, dx=3).min() == 0
    assert affine(white, dx=3, border='border').min() == 255
    assert affine(white, angle=30, border='reflection').min() == 255


# -- noise --------------------------------------------------------------------------------------
@quick
@given(**sizes, sigma=st.floats(0, 1))
def test_noise_against_a_loop(b, c, h, w, seed, sigma):
    x, e = images(b, c, h, w, seed), torch.randn(b, c, h, w, generator=seeded(seed))
    got = gaussian_noise(x, e, sigma).flatten().tolist()
    for g,p,n in zip(got, x.flatten().tolist(), e.flatten().tolist()):
        want = min(max(p + 255*sigma*n, 0), 255)
        assert abs(g - want) <= .51
    torch.testing.assert_close(gaussian_noise(x/255, e, sigma), x/255 + sigma*e)

def test_noise_per_image_sigma_and_moments():
    x = torch.full((3, 3, 64, 64), .5)
    y = gaussian_noise(x, GaussianNoise().params(*x.shape, seeded())[0], torch.tensor([0., .1, 1.]))
    std = (y - x).flatten(1).std(1)
    torch.testing.assert_close(std, torch.tensor([0., .1, 1.]), rtol=.03, atol=0)
    assert y[2].min() < 0 and y[2].max() > 1 # floats are not clamped


# -- cutout -------------------------------------------------------------------------------------
@quick
@given(**sizes, size=st.integers(0, 16))
def test_cutout_against_a_loop(b, c, h, w, seed, size):
    x = images(b, c, h, w, seed)
    cy, cx = Cutout(size).params(b, c, h, w, seeded(seed))
    want = x.clone()
    for i,(r,s) in enumerate(zip(cy.tolist(), cx.tolist())):
        top, left = r - size//2, s - size//2
        want[i, :, max(top, 0):max(top + size, 0), max(left, 0):max(left + size, 0)] = 128
    assert torch.equal(cutout(x, cy, cx, size), want)
    black = cutout(torch.ones(x.shape), cy, cx, torch.full((b,), size), 0.)
    assert torch.equal(black == 0, cutout(torch.zeros_like(x), cy, cx, size, 1.) == 255)

def test_cutout_centres_cover_the_image():
    cy, cx = Cutout(4).params(20_000, 3, 9, 5, seeded())
    assert set(cy.tolist()) == set(range(9)) and set(cx.tolist()) == set(range(5))


# -- names and bad input ------------------------------------------------------------------------
def test_presets_are_the_papers():
    assert repr(weak_augment('cifar')) == 'Compose(RandomFlip(p=0.5), RandomCrop(pad=4))'
    assert repr(weak_augment('svhn')) == 'Compose(RandomCrop(pad=4))' # house numbers are not mirrored
    assert repr(weak_augment('stl10')) == 'Compose(RandomFlip(p=0.5), RandomCrop(pad=12))'
    assert 'Flip' not in repr(weak_augment('digits'))
    assert {repr(weak_augment(n)) for n in ('cifar', 'cifar10', 'cifar100')} == {repr(weak_augment('cifar'))}

x8 = images(2, 1, 8, 8)
@pytest.mark.parametrize('f, error, words', [
    (lambda: RandomFlip(-.1), ValueError, ['p=-0.1', '0 to 1']),
    (lambda: RandomFlip(1.1), ValueError, ['p=1.1']),
    (lambda: RandomFlip(float('nan')), ValueError, ['p=nan']),
    (lambda: RandomCrop(-1), ValueError, ['pad=-1']),
    (lambda: RandomCrop(1.5), ValueError, ['pad=1.5']),
    (lambda: RandomCrop(8)(x8), ValueError, ['pad=8', '8x8', '7']),
    (lambda: reflect_crop(x8, 0, -1, 4), ValueError, ['-1', '0..8']),
    (lambda: reflect_crop(x8, torch.tensor([0, 9]), 0, 4), ValueError, ['9', '0..8']),
    (lambda: reflect_crop(x8, torch.zeros(3), 0, 4), ValueError, ['dy', '(3,)', '2 images']),
    (lambda: hflip(x8, torch.zeros(2, 1)), ValueError, ['mask', '(2, 1)']),
    (lambda: RandomAffine(degrees=-1), ValueError, ['degrees=-1']),
    (lambda: RandomAffine(translate=-1), ValueError, ['translate=-1']),
    (lambda: RandomAffine(shear=float('nan')), ValueError, ['shear=nan']),
    (lambda: RandomAffine(scale=(1.1, .9)), ValueError, ['scale=(1.1, 0.9)']),
    (lambda: GaussianNoise(-1), ValueError, ['sigma=-1']),
    (lambda: Cutout(-1), ValueError, ['size=-1']),
    (lambda: Cutout(4, 128), ValueError, ['value=128']),
    (lambda: weak_augment('mnist'), ValueError, ["'mnist'", 'cifar10', 'digits']),
    (lambda: Compose(RandomFlip(), 'crop'), TypeError, ["'crop'"]),
])
def test_bad_input(f, error, words):
    with pytest.raises(error) as e: f()
    assert all(w in str(e.value) for w in words), e.value

@pytest.mark.parametrize('t', RANDOM, ids=repr)
def test_bad_batch(t):
    with pytest.raises(ValueError, match=r'x\[None\]'): t(x8[0])
    with pytest.raises(ValueError, match='batch'): t(x8[None])
    with pytest.raises(TypeError, match='int64'): t(x8.long())


# -- time ---------------------------------------------------------------------------------------
def test_a_step_of_mixmatch_is_cheap():
    "192 images of 3x32x32: index, flip, crop in at most 6 ms of one core; the best of many runs"
    import time
    data, i, t = images(1000, 3, 32, 32), torch.randperm(1000, generator=seeded())[:192], weak_augment('cifar')
    def once():
        s = time.process_time(); t(data[i], seeded())
        return time.process_time() - s
    assert min(once() for _ in range(20)) < .006

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('t', ALL, ids=repr)
def test_the_same_pictures_on_every_device(t):
    x = images()
    want, got = t(x, seeded()), t(x.cuda(), seeded())
    assert got.is_cuda and ((got.cpu().int() - want.int()).abs() <= 1).all()
    g = torch.Generator('cuda').manual_seed(0)
    assert t(x.cuda(), g).is_cuda and t(x, g).device.type == 'cpu'
