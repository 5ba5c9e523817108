"The 19 corruptions, and the call that measures them."
import inspect, json, math
from copy import deepcopy

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fastai.vision.augment import aug_transforms
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from helpers import DIGITS, digits_dls, images, learner, quiet_fit, seeded, tiny_net, weights
from ssl_notes.core import EMATeacher
from ssl_notes.corruptions import *
from ssl_notes.corruptions import _as_given
from ssl_notes.data import ImageDL, ImageSet

names = pytest.mark.parametrize('name', list(CORRUPTIONS))
kinds = st.sampled_from(['noise', 'narrow', 'few', 'two', 'flat', 'ramp'])
sizes = st.integers(8, 40)

def at(name, s, x, generator=None):
    "The function under `corrupt`, with the published parameters"
    f, kw = CORRUPTIONS[name], dict(generator=generator)
    return f(x, *SEVERITY[name][s-1], **(kw if 'generator' in inspect.signature(f).parameters else {}))

# ------------------------------------------------------------------------------------------------ all nineteen
@names
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3]), sizes, sizes, kinds, st.integers(0, 99))
def test_shape_type_range_and_seed(name, s, b, c, h, w, kind, seed):
    x = images(b, c, h, w, seed, kind)
    y = corrupt(x, name, s, seeded(seed))
    assert y.shape == x.shape and y.dtype == torch.uint8
    f = corrupt(x/255, name, s, seeded(seed))
    assert f.dtype == torch.float32 and f.min() >= 0 and f.max() <= 1
    assert torch.equal((f*255).round().byte(), y)           # floats have the values of bytes
    assert torch.equal(corrupt(x, name, s, seeded(seed)), y)
    free = at(name, s, x/255, seeded(seed))
    assert free.isfinite().all() and free.min() >= 0 and free.max() <= 1
    assert torch.equal(_as_given(free, x), _as_given(at(name, s, x/255, seeded(seed)), x))

@names
def test_input_is_not_changed_and_seeds_differ(name):
    x = images(4, 3, 32, 32)//2 + 64
    before = x.clone()
    a, b = (corrupt(x, name, 5, seeded(o)) for o in (0, 1))
    assert torch.equal(x, before)
    fixed = {'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression', 'gaussian_blur', 'saturate'}
    assert torch.equal(a, b) == (name in fixed)
    assert not torch.equal(a, x)

@names
def test_types_and_subclasses_come_back(name):
    x = images(2, 3, 16, 16)
    for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert corrupt((x/255).to(t), name, 2, seeded()).dtype == t
    assert type(corrupt(TensorImage(x/255), name, 2)) is TensorImage
    assert corrupt(x[:0], name, 2).shape == (0, 3, 16, 16)
    strided = images(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert torch.equal(corrupt(strided, name, 2, seeded()), corrupt(x, name, 2, seeded()))

@names
def test_large_pictures(name):
    x = images(1, 3, 224, 200, kind='ramp')
    assert corrupt(x, name, 5, seeded()).shape == x.shape

@names
def test_the_default_generator_is_torchs(name):
    x = images(2, 1, 12, 12)
    torch.manual_seed(3); a = corrupt(x, name, 3)
    torch.manual_seed(3); b = corrupt(x, name, 3)
    assert torch.equal(a, b)

def test_names_and_order():
    assert len(BENCHMARK) == 15 and len(EXTRA) == 4 and list(CORRUPTIONS) == BENCHMARK + EXTRA == list(SEVERITY)
    assert all(len(v) == 5 for v in SEVERITY.values())
    assert BENCHMARK[0] == 'gaussian_noise' and BENCHMARK[-1] == 'jpeg_compression'

@pytest.mark.parametrize('s', [0, 6, -1, 1.5, 2., True, '3', None, [1], math.nan])
def test_severity_is_checked(s):
    for f in (lambda: corrupt(images(), 'fog', s), lambda: Corrupt('fog', s)):
        with pytest.raises(ValueError, match='a whole number from 1 to 5'): f()

def test_numpys_integers_are_severities():
    assert torch.equal(corrupt(images(), 'contrast', np.int64(3)), corrupt(images(), 'contrast', 3))

@pytest.mark.parametrize('x, error, text', [
    (images(c=2), ValueError, '1 channel'), (images(c=4), ValueError, '3 channels'),
    (images()[0], ValueError, 'batch'), (images().int(), TypeError, 'uint8'),
    (images() > 3, TypeError, 'uint8'), (images()/255*3 - 1, ValueError, 'before Normalize'),
    (images().float(), ValueError, 'before Normalize'), (images()/255*math.nan, ValueError, r'lie in \[0,1\]')])
def test_bad_images_are_refused(x, error, text):
    for n in CORRUPTIONS:
        with pytest.raises(error, match=text): corrupt(x, n, 1)
        with pytest.raises(error, match=text): at(n, 1, x)

def test_unknown_names_list_the_known():
    for f in (lambda: corrupt(images(), 'rain', 1), lambda: Corrupt('rain'), lambda: corrupted(images(), 'rain', 1)):
        with pytest.raises(ValueError, match="'rain'.*gaussian_noise.*saturate"): f()

# ------------------------------------------------------------------------------------------------ one by one
@pytest.mark.parametrize('name, args', [('gaussian_noise', (0,)), ('impulse_noise', (0,)), ('speckle_noise', (0,)), ('gaussian_blur', (0,)),
    ('zoom_blur', (1,)), ('glass_blur', (0, 1, 0)), ('motion_blur', (3, 1e-3)), ('frost', (1, 0)), ('fog', (0, 2)), ('brightness', (0,)),
    ('contrast', (1,)), ('saturate', (1, 0)), ('elastic_transform', (0, 0, 0)), ('pixelate', (1,)), ('snow', (0, 0, 1, .5, 3, 1, 1)),
    ('spatter', (0, 0, .7, .7, .5, 'water')), ('spatter', (0, 0, .7, .7, .5, 'mud'))])
def test_parameter_zero_changes_nothing(name, args):
    x = images(3, 3, 14, 11)
    assert torch.equal(CORRUPTIONS[name](x, *args), x)

def test_a_black_and_a_white_image():
    black, white = torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)
    for n in ('shot_noise', 'speckle_noise', 'fog', 'gaussian_blur', 'zoom_blur', 'motion_blur', 'contrast', 'saturate', 'pixelate'):
        assert at(n, 5, black, seeded()).max() == 0, n
    for n in ('gaussian_blur', 'zoom_blur', 'motion_blur', 'defocus_blur', 'glass_blur', 'contrast', 'pixelate', 'brightness', 'elastic_transform'):
        assert at(n, 5, white, seeded()).min() > .999, n
    assert torch.allclose(at('brightness', 5, black), torch.tensor(.3))

def test_noise_is_drawn_for_every_value():
    x = torch.full((2, 3, 64, 64), .5)
    for n in ('gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise'):
        d = (at(n, 5, x, seeded()) - .5).transpose(0, 1).flatten(1)
        assert torch.corrcoef(d).fill_diagonal_(0).abs().max() < .05

@pytest.mark.parametrize('shift', [1, 2, 3])
def test_glass_moves_by_no_more_than_its_shift(shift):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pos = glass_blur(x, 0., shift, 1, seeded()).long()
    dy, dx = pos//16 - torch.arange(16)[:, None], pos % 16 - torch.arange(16)
    for d in (dy, dx): assert -shift <= d.min() < 0 and d.max() <= shift - 1
    assert torch.equal(pos[..., :shift + 1, :], x[..., :shift + 1, :].long())
    assert torch.equal(pos[..., :shift + 1], x[..., :shift + 1].long())

def test_motion_runs_one_way_in_the_given_direction():
    x = torch.zeros(1, 1, 21, 21); x[0, 0, 10, 10] = 1
    y = motion_blur(x, 4, 3., (45., 45.))[0, 0]
    assert (y.nonzero()[:, 0] == y.nonzero()[:, 1]).all() and len(y.nonzero()) == 7   # 9 steps of rounded 0.707
    assert abs(y.sum() - 1) < 1e-6

def test_plasma_against_a_walk_point_by_point(monkeypatch):
    import ssl_notes.corruptions as C
    drawn, real = [], C._draw
    monkeypatch.setattr(C, '_draw', lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    fast = plasma(1, 16, 16, 2., seeded())[0, 0]
    n, m, step, w, q = 16, np.zeros((16, 16)), 16, 100., 0
    d = [2*o[0].double().numpy() - 1 for o in drawn]
    while step >= 2:
        h = step//2
        for i in range(0, n, step):
            for j in range(0, n, step):
                four = m[i, j] + m[(i + step) % n, j] + m[i, (j + step) % n] + m[(i + step) % n, (j + step) % n]
                m[i + h, j + h] = four/4 + w*w*d[q][i//step, j//step]
        for i in range(0, n, step):
            for j in range(0, n, step):
                mid, k = m[i + h, j + h], (i//step, j//step)
                m[i, j + h] = (mid + m[(i - h) % n, j + h] + m[i, j] + m[i, (j + step) % n])/4 + w*w*d[q+1][k]
                m[i + h, j] = (mid + m[i + h, (j - h) % n] + m[i, j] + m[(i + step) % n, j])/4 + w*w*d[q+2][k]
        q, step, w = q + 3, h, w/2.
    assert np.abs((m - m.min())/(m.max() - m.min()) - fast.numpy()).max() < 1e-5

def test_own_frost():
    own = torch.zeros(2, 3, 20, 20, dtype=torch.uint8); own[1] = 255
    x = torch.zeros(40, 3, 8, 8)
    y = frost(x, 1., .4, own, seeded())
    assert y.unique().tolist() == pytest.approx([0, .4])
    assert frost(x[:, :1], 1., .4, own).shape == (40, 1, 8, 8)
    for bad in (own[:, :1], own[0], own[..., :7]):
        with pytest.raises(ValueError, match='texture: got shape'): frost(x, 1., .4, bad)

def test_bad_parameters():
    with pytest.raises(ValueError, match='rate=0'): shot_noise(images(), 0)
    with pytest.raises(ValueError, match="kind='oil'"): spatter(images(), 0., 0., .7, .7, .5, 'oil')

def test_corrupt_in_a_compose():
    from ssl_notes.augment import Compose, RandomFlip
    t = Compose(RandomFlip(), Corrupt('gaussian_noise', 2))
    x = images(3, 1, 8, 8)
    assert torch.equal(t(x, seeded()), t(x, seeded())) and repr(t).count('Corrupt') == 1

# ------------------------------------------------------------------------------------------------ the numbers
E = torch.tensor([[.1, .2, .3, .4, .5], [.2, .2, .3, .3, .4]])
REF = torch.tensor([[.5, .6, .7, .8, .9], [.4, .5, .6, .7, .8]])

def test_toy_numbers():
    assert corruption_error(E, REF).tolist() == pytest.approx([.42857143, .46666667])
    assert mean_corruption_error(E, REF) == pytest.approx(.44761905) and mean_corruption_error(E) == pytest.approx(.29)
    assert relative_corruption_error(E, REF, .05, .4).tolist() == pytest.approx([.83333333, 1.15])

def full(e=.3): return CorruptionReport(.1, torch.full((19, 5), e), list(SEVERITY), n=7, seconds=1.)

def test_reports():
    r = CorruptionReport(.05, torch.arange(95.).view(19, 5)/100, list(SEVERITY))
    assert r.mean() == pytest.approx(.37) and r.mean(19) == pytest.approx(.47) == r.mean(None)
    assert full(.6).mce(full(.3)) == pytest.approx(2) and full(.5).relative(full(.3)) == pytest.approx(2)
    assert full(.8).mce(ALEXNET) == pytest.approx(np.mean([.8/ALEXNET[n] for n in BENCHMARK]))
    with pytest.raises(ValueError, match='n=3'): r.mean(3)
    part = CorruptionReport(.05, E[:, :2], ['fog', 'snow'], (1, 3))
    for n in (15, 19):
        with pytest.raises(ValueError, match='frost.*missing'): part.mean(n)
    assert part.mean(None) == pytest.approx(.175)
    with pytest.raises(ValueError, match='errors: got shape'): CorruptionReport(0, E, ['fog'])
    with pytest.raises(ValueError, match='other corruptions'): part.mce(full(), None)
    again = CorruptionReport.from_dict(json.loads(json.dumps(full().to_dict())))
    assert again.mean() == pytest.approx(.3) and again.info == dict(n=7, seconds=1.)
    t = full().table()
    assert t.loc['fog', 'mean'] == 30 and t.loc['mean over 19', 5] == 30 and t.shape == (21, 6)
    assert '10.0 %' in repr(full()) and '<table' in full()._repr_html_()

def test_heat_map():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    ax = full().heat_map()
    assert len(ax.texts) == 95
    assert full().heat_map(ax) is ax
    plt.close('all')

# ------------------------------------------------------------------------------------------------ learners
FEW = dict(names=['impulse_noise', 'contrast'], severities=(1, 5))

def measure(learn, dl=None, **kw):
    with learn.no_bar(): return learn.corruption_errors(dl, **{**FEW, **kw})

@pytest.fixture(scope='module')
def trained(): return quiet_fit(learner(dls=digits_dls(bs=32, steps=60, n=400)), 2, 1e-2)

def by_hand(learn, x, y):
    learn.model.eval()
    with torch.no_grad(): return float((learn.model(x/255).argmax(1) != y).float().mean())

def test_errors_are_what_one_counts_by_hand(trained):
    r, data = measure(trained), trained.dls.valid.dataset
    assert r.clean == pytest.approx(by_hand(trained, data.x, data.y)) and r.info['n'] == len(data)
    for i,n in enumerate(r.names):
        for j,s in enumerate(r.severities):
            assert float(r.errors[i, j]) == pytest.approx(by_hand(trained, corrupted(data.x, n, s), data.y))
    with trained.no_bar(): assert torch.equal(corruption_errors(trained, **FEW).errors, r.errors)

def test_pictures_do_not_depend_on_batches_names_or_loaders(trained):
    data = ImageSet(DIGITS.test.x[:300], DIGITS.test.y[:300], DIGITS.test.vocab)
    a = measure(trained, ImageDL(data, 7, device='cpu'))
    b = measure(trained, ImageDL(data, 256, device='cpu'), names=['contrast', 'fog', 'impulse_noise'])
    assert torch.equal(a.errors[0], b.errors[2]) and torch.equal(a.errors[1], b.errors[0])
    items = list(zip(TensorImage(data.x/255), data.y))
    c = measure(trained, TfmdDL(items, bs=13, num_workers=0))
    d = measure(trained, torch.utils.data.DataLoader([(x, int(y)) for x,y in zip(data.x/255, data.y)], batch_size=50))
    stream = measure(trained, ImageDL(data, 8, steps=3, device='cpu'))
    assert all(torch.equal(a.errors, o.errors) and a.clean == o.clean for o in (c, d, stream))
    assert not torch.equal(a.errors, measure(trained, ImageDL(data, 7, device='cpu'), seed=1).errors)

def test_normalize_is_on_top(trained):
    data = DIGITS.test.subset(torch.arange(60))
    items = list(zip(TensorImage(data.x/255), data.y))
    norm = Normalize.from_stats([.3], [.5], cuda=False)
    model = nn.Sequential(Undo(.3, .5), trained.model)
    dl = TfmdDL(items, bs=20, num_workers=0, after_batch=[norm])
    learn = Learner(DataLoaders(dl, dl), model, CrossEntropyLossFlat())
    a, b = measure(learn), measure(trained, ImageDL(data, 20, device='cpu'))
    assert torch.equal(a.errors, b.errors) and a.clean == b.clean
    own = ImageDL(data, 20, device='cpu', after_batch=[norm])
    assert torch.equal(measure(learn, own).errors, b.errors)

class Undo(nn.Module):
    def __init__(self, mean, std): super().__init__(); self.mean, self.std = mean, std
    def forward(self, x): return x*self.std + self.mean

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Two classes of colour files, 24 x 20 pixels."
    from PIL import Image
    root = tmp_path_factory.mktemp('pictures')
    for c in range(2):
        (root/str(c)).mkdir()
        for i in range(6):
            a = images(1, 3, 24, 20, 10*c + i)[0].permute(1, 2, 0).numpy()//2 + 127*c
            Image.fromarray(a.astype(np.uint8)).save(root/str(c)/f'{i}.png')
    return root

def block_dls(files, bs=4, **kw):
    from fastai.data.transforms import RandomSplitter, get_image_files, parent_label
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.5, seed=0),
                      batch_tfms=aug_transforms(size=(24, 20)), **kw)
    return block.dataloaders(files, bs=bs, num_workers=0, device='cpu')

def test_vision_learner_on_files(files):
    dls = block_dls(files)
    learn = vision_learner(dls, resnet18, pretrained=False, n_out=2, normalize=False, metrics=accuracy)
    dls.add_tfms([Normalize.from_stats([.5]*3, [.25]*3, cuda=False)], 'after_batch')
    before, tfms = dict(vars(learn)), list(dls.valid.after_batch.fs)
    a, b = measure(learn), measure(learn)
    assert torch.equal(a.errors, b.errors) and a.info['n'] == 6
    assert list(dls.valid.after_batch.fs) == tfms and vars(learn).keys() - {'progress'} == before.keys() - {'progress'}
    xs, ys = zip(*[(x, y) for x,y in dls.valid])
    x = torch.cat(xs).as_subclass(torch.Tensor)
    raw = ((x*.25 + .5)*255).round().clamp(0, 255).byte()
    bad = (corrupted(raw, 'contrast', 5)/255 - .5)/.25
    learn.model.eval()
    with torch.no_grad(): e = (learn.model(bad).argmax(1) != torch.cat(ys)).float().mean()
    assert float(a.errors[1, 1]) == pytest.approx(float(e))

def state(learn):
    v = {k: o for k,o in vars(learn).items() if k not in ('progress', 'cbs')}
    r = learn.recorder
    return v, list(learn.cbs), [m.training for m in learn.model.modules()], dict(lrs=list(r.lrs), losses=[float(o) for o in r.losses],
        values=[list(o) for o in r.values], iters=list(r.iters), smooth=float(r.smooth_loss.value), names=list(r.metric_names))

def assert_same(a, b):
    assert a[0].keys() == b[0].keys() and all(a[0][k] is b[0][k] for k in a[0])
    assert set(map(id, a[1])) == set(map(id, b[1])) and a[2:] == b[2:]

def test_the_learner_is_left_as_it_was(tmp_path):
    learn = learner([SaveModelCallback()], path=tmp_path)
    quiet_fit(learn, 1)
    learn.model.train(); learn.model[0].eval()
    w, before, rng = weights(learn), state(learn), torch.get_rng_state()
    with learn.no_bar():
        inside = state(learn)
        r = learn.corruption_errors(**FEW)
        assert_same(inside, state(learn))
    assert before[2:] == state(learn)[2:] and all(torch.equal(w[k], v) for k,v in weights(learn).items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(cb.learn is learn for cb in learn.cbs)
    assert len(r.errors) == 2

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_the_learner_is_left_as_it_was_after_an_interruption(error):
    class Stop(Callback):
        n = 0
        def before_batch(self):
            self.n += 1
            if self.n == 2: raise error('enough')
    learn = quiet_fit(learner(EMATeacher(.5)), 1)
    before = state(learn)
    learn.add_cb(Stop())
    with learn.no_bar():
        inside = state(learn)
        with pytest.raises(error): learn.corruption_errors(**FEW)
        assert_same(inside, state(learn))
    learn.remove_cb(Stop)
    assert before[2:] == state(learn)[2:]
    quiet_fit(learn, 1)
    assert len(learn.recorder.losses) == len(learn.dls.train)

def test_the_averaged_teacher_is_judged():
    learn = quiet_fit(learner(EMATeacher(.9)), 1)
    with torch.no_grad():
        for p in learn.ema_teacher.teacher[-1].parameters(): p.zero_()
        learn.ema_teacher.teacher[-1].bias[3] = 1
    r, y = measure(learn), learn.dls.valid.dataset.y
    assert r.clean == pytest.approx(float((y != 3).float().mean())) and (r.errors == r.clean).all()

def test_a_call_in_the_middle_of_training():
    class Now(Callback):
        order, reports = 70, []
        def after_epoch(self):
            if self.training or hasattr(self, 'gather_preds'): return
            self.reports.append(self.learn.corruption_errors(**FEW))
    plain = quiet_fit(learner(), 2)
    learn = learner(now := Now())
    quiet_fit(learn, 2)
    assert len(now.reports) == 2
    assert all(torch.equal(a, b) for a,b in zip(weights(plain).values(), weights(learn).values()))
    assert [list(o)[:3] for o in plain.recorder.values] == [list(o)[:3] for o in learn.recorder.values]

def test_layouts_precision_and_compiled_models(trained):
    a = measure(trained)
    learn = Learner(trained.dls, deepcopy(trained.model).to(memory_format=torch.channels_last), CrossEntropyLossFlat())
    assert (measure(learn).errors - a.errors).abs().max() < .03
    class Bf16(nn.Module):
        def __init__(self, m): super().__init__(); self.m = m
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16): return self.m(x)
    assert (measure(Learner(trained.dls, Bf16(trained.model), CrossEntropyLossFlat())).errors - a.errors).abs().max() < .06
    compiled = torch.compile(trained.model, backend='eager')
    assert (measure(Learner(trained.dls, compiled, CrossEntropyLossFlat())).errors - a.errors).abs().max() < .03

def test_the_bar_is_drawn_only_where_there_is_one(trained, monkeypatch):
    import ssl_notes.corruptions as C
    asked = []
    monkeypatch.setattr(C, 'progress_bar', lambda o, **kw: asked.append(len(o)) or o)
    measure(trained); assert not asked
    trained.corruption_errors(**FEW); assert asked == [4]

def test_what_cannot_be_evaluated_is_refused(trained):
    x, y = DIGITS.test.x[:8], DIGITS.test.y[:8]
    def dl(a, b, **kw): return TfmdDL(list(zip(a, b)), bs=4, num_workers=0, **kw)
    for bad, text in [(dl(x/255*4 - 2, y), r'expected \[0,1\]'), (dl(x.float(), y), r'expected \[0,1\]'),
                      (dl(x/255, torch.rand(8)), 'one class number'), (dl(x/255, torch.rand(8, 10)), 'one class number'),
                      (TfmdDL([(a,) for a in x/255], bs=4, num_workers=0), 'images, classes'),
                      (ImageDL(ImageSet(x), 4, device='cpu'), 'unknown'), (dl(x/255, y*0 - 1), 'unknown'),
                      (ImageDL(ImageSet(x[:0], y[:0], range(10)), 4, device='cpu'), 'not one')]:
        with pytest.raises(ValueError, match=text): measure(trained, bad)
    mixed = [(torch.rand(1, 8, 8), 0)]*4 + [(torch.rand(1, 9, 9), 0)]*4
    with pytest.raises(ValueError, match='differ in size'): measure(trained, TfmdDL(mixed, bs=4, num_workers=0))
    for kw, text in [(dict(names=[]), 'at least one'), (dict(names=['fog', 'fog']), 'each once'), (dict(names='rain'), "'rain'"),
                     (dict(severities=()), 'severities'), (dict(severities=(1, 7)), 'severity=7')]:
        with pytest.raises(ValueError, match=text): measure(trained, **kw)
    flat = Learner(trained.dls, nn.Sequential(trained.model, nn.Flatten(0)), lambda p, y: p.sum())
    with pytest.raises(ValueError, match='one row of class scores'): measure(flat)

def test_bytes_stay_bytes(trained):
    x, y = DIGITS.test.x[:40], DIGITS.test.y[:40]
    model = nn.Sequential(Undo(0., 1/255.), trained.model)
    learn = Learner(trained.dls, model, CrossEntropyLossFlat())
    a = measure(learn, TfmdDL(list(zip(x, y)), bs=9, num_workers=0))
    assert torch.equal(a.errors, measure(trained, ImageDL(ImageSet(x, y, range(10)), 9, device='cpu')).errors)

# ------------------------------------------------------------------------------------------------ the files
@pytest.fixture
def cifar(tmp_path):
    "Two corruptions of six images, in five blocks."
    for i,n in enumerate(('fog', 'spatter')):
        np.save(tmp_path/f'{n}.npy', images(30, 3, 8, 8, i).permute(0, 2, 3, 1).numpy())
    np.save(tmp_path/'labels.npy', np.tile(np.arange(6), 5).astype(np.uint8))
    return tmp_path

def test_blocks_of_the_arrays(cifar):
    x = images(30, 3, 8, 8, 1)
    for s in range(1, 6):
        xs, ys = cifar_c(cifar, 'spatter', s)
        assert torch.equal(xs, x[6*s - 6:6*s]) and ys.tolist() == list(range(6)) and ys.dtype == torch.int64
    np.save(cifar/'labels.npy', np.arange(6))
    assert cifar_c(str(cifar), 'fog', 5)[1].tolist() == list(range(6))

def test_arrays_are_evaluated_in_the_same_call(cifar):
    data = ImageSet(images(9, 3, 8, 8, 5), torch.arange(9) % 6, range(10))
    dls = DataLoaders(ImageDL(data, 4, device='cpu'), ImageDL(data, 4, device='cpu'))
    learn = Learner(dls, tiny_net(channels=3), CrossEntropyLossFlat())
    r = measure(learn, names=None, severities=(1, 2, 3, 4, 5), folder=cifar)
    assert r.names == ['fog', 'spatter'] and r.info['folder'] == cifar.name and r.info['n'] == 9
    for s in range(1, 6):
        assert float(r.errors[1, s-1]) == pytest.approx(by_hand(learn, *cifar_c(cifar, 'spatter', s)))
    grey = learner()   # of one channel
    with pytest.raises(ValueError, match='the network needs the same'): measure(grey, names=['fog'], folder=cifar)

def test_damaged_folders(cifar):
    with pytest.raises(FileNotFoundError, match='snow.npy is not there.*fog, labels, spatter'): cifar_c(cifar, 'snow', 1)
    with pytest.raises(FileNotFoundError, match='no .npy file'): cifar_c(cifar/'nowhere', 'snow', 1)
    with pytest.raises(ValueError, match='severity=6'): cifar_c(cifar, 'fog', 6)
    good = np.load(cifar/'fog.npy').copy()
    for bad in (good[:29], good.astype(np.float32), good[..., :2], good[0], good[:0]):
        np.save(cifar/'fog.npy', bad)
        with pytest.raises(ValueError, match='fog.npy: got'): cifar_c(cifar, 'fog', 1)
    (cifar/'fog.npy').write_bytes(b'no array')
    with pytest.raises(ValueError, match='damaged'): cifar_c(cifar, 'fog', 1)
    np.save(cifar/'fog.npy', good); np.save(cifar/'labels.npy', np.arange(7))
    with pytest.raises(ValueError, match='labels.npy: got shape'): cifar_c(cifar, 'fog', 1)
    with pytest.raises(FileNotFoundError, match='gaussian_noise.npy is not there'): measure(learner(), names=None, folder=cifar/'nowhere')
