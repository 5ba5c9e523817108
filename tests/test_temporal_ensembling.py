"Pi-model and Temporal Ensembling: the table Z, both kinds of loaders, mistakes, kills, fastai's own loaders."
import json, random, re, signal
from functools import partial
from pathlib import Path

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner, defaults, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock

from ssl_notes.augment import weak_augment
from ssl_notes.core import Checkpoint, read_checkpoint, unlabeled_dl
from ssl_notes.data import ImageDL, SemiDataLoaders, Splits, mixed_dls
from ssl_notes.models import small_cnn
from ssl_notes.temporal_ensembling import (PiModelCallback, TemporalEnsemblingCallback, consistency_loss, consistency_weight,
                                           ensemble_target, ensemble_update, masked_cross_entropy)

from helpers import (DIGITS, Every, die, differences, digits_dls, in_child, learner, linux, quiet_fit, tiny_net, weights)

BOTH = [PiModelCallback, TemporalEnsemblingCallback]
both = pytest.mark.parametrize('cls', BOTH)
kinds = pytest.mark.parametrize('kind', ['mixed', 'streams'])

def mixed(bs=20, n=40, valid=40, size=200, **kw):
    "`size` digits, 40 labels: ten batches an epoch."
    random.seed(0)
    data = Splits(DIGITS.train.subset(slice(size)), DIGITS.test.subset(slice(valid)), name='digits')
    return mixed_dls(data, n, bs=bs, device='cpu', **{**dict(augment=weak_augment('digits')), **kw})

def loaders(kind, **kw): return mixed(**kw) if kind == 'mixed' else digits_dls(**kw)

def refused(learn, *words, error=ValueError, n=1):
    w = weights(learn)
    with pytest.raises(error) as e: quiet_fit(learn, n, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    assert differences(w, weights(learn)) == []

def whole(cb):
    "Each row sums to 1 - alpha^t, whatever has happened to it."
    assert cb.Z.isfinite().all()
    torch.testing.assert_close(cb.Z.sum(1), 1 - cb.alpha**cb.t.float(), atol=1e-5, rtol=0)


# -- the functions --------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, .99), st.integers(1, 12))
def test_rows_that_miss_epochs_sum_to_one(seed, alpha, epochs):
    g = torch.Generator().manual_seed(seed)
    Z, t = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.int32)
    past = [[] for _ in range(6)]
    for _ in range(epochs):
        idx = (torch.rand(6, generator=g) < .6).nonzero()[:, 0]
        z = torch.rand(len(idx), 4, generator=g, dtype=torch.float64).softmax(1)
        Z[idx], t[idx] = ensemble_update(Z[idx], z, alpha), t[idx] + 1
        for i,row in zip(idx.tolist(), z): past[i].append(row)
    target = ensemble_target(Z, t, alpha)
    torch.testing.assert_close(target.sum(1), (t > 0).double())
    for i,rows in enumerate(past):
        if not rows: continue
        share = torch.tensor([alpha**(len(rows)-1-k) for k in range(len(rows))], dtype=torch.float64)
        torch.testing.assert_close(target[i], (torch.stack(rows)*(share/share.sum())[:, None]).sum(0))

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(2, 6))
def test_losses_against_loops(seed, b, c):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(b, c, generator=g)*3, torch.randint(-1, c, (b,), generator=g)
    rows = (y[:, None] == torch.arange(c)).float()
    loop = sum(-x[i].log_softmax(0)[y[i]] for i in range(b) if y[i] >= 0)/b
    torch.testing.assert_close(masked_cross_entropy(x, rows), torch.as_tensor(loop, dtype=torch.float32))
    p = torch.randn(b, c, generator=g).softmax(1)
    loss = consistency_loss(x, p)
    torch.testing.assert_close(loss, sum(float(((x[i].softmax(0)-p[i])**2).sum()) for i in range(b))/b/c + torch.zeros(()))
    assert 0 <= loss <= 2/c + 1e-6

@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.floats(0, 1000), st.integers(0, 200))
def test_weight_grows_to_its_maximum(epoch, w_max, rampup):
    w = consistency_weight(epoch, w_max, rampup)
    assert 0 <= w <= w_max and (epoch > 0 or w == 0) and consistency_weight(epoch+1, w_max, rampup) >= w
    assert epoch < max(rampup, 1) or w == w_max


# -- the table ------------------------------------------------------------------------------------
def test_one_row_for_each_position():
    "Rows move only where an image was seen, and only by its own prediction"
    cb = TemporalEnsemblingCallback(rampup=1)
    learn, real = learner([cb], dls=mixed()), cb.remember
    def remember(z):
        Z, t, idx = cb.Z.clone(), cb.t.clone(), cb.idx
        real(z)
        rest = torch.ones(200, dtype=torch.bool).index_fill(0, idx, False)
        assert torch.equal(cb.Z[rest], Z[rest]) and torch.equal(cb.t[rest], t[rest])
        for i,row in zip(idx.tolist(), z): torch.testing.assert_close(cb.Z[i], .6*Z[i] + .4*row)
    cb.remember = remember
    quiet_fit(learn, 2, 1e-2)
    assert cb.t.eq(2).all()
    whole(cb)

def test_dropped_batches():
    "200 images in batches of 30: twenty of them miss each epoch, and never the same"
    cb = TemporalEnsemblingCallback(rampup=1)
    quiet_fit(learner([cb], dls=mixed(bs=30)), 4, 1e-2)
    assert cb.t.sum() == 4*180 and len(cb.t.unique()) > 1
    whole(cb)

def test_first_seen_rows_have_no_loss():
    cb, losses = TemporalEnsemblingCallback(rampup=0), []
    learn, real = learner([cb], dls=mixed()), cb.loss_terms
    def loss_terms(logits):
        terms = real(logits)
        g = torch.autograd.grad(terms['loss_u'][0], logits, retain_graph=True)[0]
        losses.append((float(terms['loss_u'][0].detach()), float(g.abs().max())))
        return terms
    cb.loss_terms = loss_terms
    quiet_fit(learn, 2, 1e-2)
    assert losses[:10] == [(0., 0.)]*10 and all(l > 0 and g > 0 for l,g in losses[10:])

def test_an_image_twice_in_a_batch():
    "At the seam of two permutations; one of its looks counts"
    cb = TemporalEnsemblingCallback(rampup=1)
    quiet_fit(learner([cb], dls=mixed(bs=30, steps=9)), 3, 1e-2)
    whole(cb)
    dls = digits_dls(steps=9, ubs=100, bs=40, n=40)
    cb = TemporalEnsemblingCallback(rampup=1)
    quiet_fit(learner([cb], dls=dls), 2, 1e-2)
    whole(cb)

@kinds
@both
def test_accumulated_gradients(cls, kind):
    "Epochs, not updates, count for the ramp; each small batch enters the table once"
    cb = cls(rampup=2)
    learn = quiet_fit(learner([cb, GradientAccumulation(10**6)], dls=loaders(kind)), 3, 1e-2)
    assert cb.epochs == 3 and cb.weight() == pytest.approx(cb.w_max*(.2 if kind == 'mixed' else 1))
    if cls is TemporalEnsemblingCallback:
        whole(cb)
        if kind == 'mixed': assert cb.t.eq(3).all()
    values = [v[-1] for v in learn.recorder.values]     # the column `weight`
    assert values[0] == 0 < values[1] < values[2]

@kinds
@both
def test_lr_find_leaves_no_trace(cls, kind):
    cb = cls(rampup=1)
    learn = quiet_fit(learner([cb], dls=loaders(kind)), 1, 1e-2)
    before = {k: (v.clone() if isinstance(v, torch.Tensor) else v) for k,v in cb.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=15, show_plot=False)
        learn.validate(), learn.get_preds()
    assert differences(before, cb.state_dict()) == []
    fresh = cls(rampup=1)
    learn = learner([fresh], dls=loaders(kind))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=15, show_plot=False)
    assert fresh.epochs == fresh.n_step == 0 and getattr(fresh, 'Z', None) is None

def test_a_loaded_state_is_ones_own():
    cb = TemporalEnsemblingCallback(rampup=1)
    learn = quiet_fit(learner([cb], dls=mixed()), 1, 1e-2)
    other = TemporalEnsemblingCallback(rampup=1)
    other.load_state_dict(cb.state_dict())
    kept = other.Z.clone()
    quiet_fit(learn, 1, 1e-2)
    assert torch.equal(other.Z, kept) and not torch.equal(cb.Z, kept)

@kinds
def test_nan_stays_out_of_the_table(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.bad = tiny_net(), False
        def forward(self, x): return self.net(x)*(float('nan') if self.bad and self.training else 1.)
    cb = TemporalEnsemblingCallback(rampup=1)
    learn = quiet_fit(learner([cb], dls=loaders(kind), model=Net), 1, 1e-2)
    Z, t, learn.model.bad = cb.Z.clone(), cb.t.clone(), True
    with pytest.raises(FloatingPointError, match='the loss term loss_x is not finite'): quiet_fit(learn, 1, 1e-2)
    assert torch.equal(cb.Z, Z) and torch.equal(cb.t, t)
    learn.model.bad = False
    quiet_fit(learn, 1, 1e-2)
    whole(cb)

@both
def test_bfloat16(cls):
    "Under autocast the table and the losses stay in fp32"
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16): return self.net(x)
    cb = cls(rampup=1)
    seen = []
    quiet_fit(learner([cb], dls=mixed(), model=Half), 2, 1e-2, cbs=Every('after_loss', lambda c: seen.append(c.loss_grad.dtype)))
    assert set(seen) == {torch.float32}
    if cls is TemporalEnsemblingCallback:
        assert cb.Z.dtype == torch.float32
        whole(cb)


# -- the Pi-model ---------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize('batchnorm', ['joint', 'separate'])
@pytest.mark.parametrize('detach', [False, True])
def test_every_way(kind, batchnorm, detach):
    cb = PiModelCallback(rampup=1, batchnorm=batchnorm, detach=detach, flip=.5)
    learn = quiet_fit(learner([cb], dls=loaders(kind)), 2, 1e-2)
    assert np.isfinite(learn.recorder.losses).all() and cb.share == (.2 if kind == 'mixed' else 1.)

def test_labelled_rows_are_mirrored_too():
    "With two streams the labelled images pass no other flip"
    cb = PiModelCallback(flip=1.)
    x, views = torch.arange(8.).expand(3, 1, 8, 8), torch.arange(8.).expand(2, 5, 1, 8, 8)
    cb.batchnorm, cb.mixed = 'joint', False
    rows = cb.make_batch(x, torch.zeros(3, 10), views, None)
    assert rows.shape == (13, 1, 8, 8) and (rows[..., 0] == 7).all()

def test_looks_are_drawn_anew_and_alike_for_one_seed():
    def looks(seed):
        seen, cb = [], PiModelCallback(rampup=0, seed=seed)
        real = cb.mirror
        cb.mirror = lambda v: seen.append(v) or real(v)
        quiet_fit(learner([cb], dls=mixed()), 1)
        return seen
    a, b, c = looks(0), looks(0), looks(1)
    assert all(torch.equal(x, y) for x,y in zip(a, b)) and len(a) == 10
    assert not torch.equal(a[0][0], a[0][1]) and torch.equal(a[0][0], c[0][0]) and not torch.equal(a[0][1], c[0][1])

def test_second_fit_goes_on():
    "Two fits of two epochs are four epochs for the ramp, and no ramp is asked for twice"
    cb = PiModelCallback(rampup=2)
    learn = quiet_fit(learner([cb], dls=mixed()), 2)
    quiet_fit(learn, 1)
    assert cb.epochs == 3 and cb.weight() == pytest.approx(100*.2)


# -- mistakes -------------------------------------------------------------------------------------
class Items:
    def __init__(self, n=40, shape=(1, 8, 8), dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(n, *shape, generator=g).to(dtype), torch.arange(n) % 10
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]

def loader(items, bs=8, shuffle=True): return TfmdDL(items, bs=bs, shuffle=shuffle, drop_last=shuffle, num_workers=0)

def own_dls(items=None, bs=8):
    dls = DataLoaders(loader(items or Items(), bs), loader(Items(16), 8, False))
    dls.c = 10
    return dls

@pytest.mark.parametrize('kw', [dict(w_max=-1), dict(w_max=float('nan')), dict(w_max=float('inf')), dict(rampup=-1),
    dict(rampup=float('nan')), dict(batchnorm='interleave'), dict(ema=2)], ids=str)
@both
def test_arguments(cls, kw):
    with pytest.raises(ValueError, match=next(iter(kw))): cls(**kw)

@pytest.mark.parametrize('alpha', [1, 1.5, -.1, float('nan')])
def test_alpha(alpha):
    with pytest.raises(ValueError, match='alpha: got'): TemporalEnsemblingCallback(alpha=alpha)

@pytest.mark.parametrize('flip', [-.1, 1.1, float('nan')])
def test_flip(flip):
    with pytest.raises(ValueError, match='flip: got'): PiModelCallback(flip=flip)

@kinds
@both
def test_ramp_longer_than_training(cls, kind):
    refused(learner([cls()], dls=loaders(kind)), 'rampup: got 80 epochs, but the training has 3', 'rampup=1', n=3)

@both
def test_no_unlabelled_data(cls):
    refused(learner([cls(rampup=1)], dls=own_dls()), f'unlabeled: {cls.__name__} has no unlabelled data')

@both
@pytest.mark.parametrize('kw', [dict(shape=(1, 9, 9)), dict(shape=(3, 8, 8)), dict(dtype=torch.float64)])
def test_unlike_images(cls, kw):
    refused(learner([cls(loader(Items(**kw)), rampup=1)], dls=own_dls()), 'both must be alike')

@both
def test_sizes(cls):
    refused(learner([cls(loader(Items(5), shuffle=False), rampup=1)], dls=own_dls()), '5 images do not fill one batch of 8')
    refused(learner([cls(loader(Items()), rampup=1)], dls=own_dls(bs=1)), 'a batch of one labelled image')
    refused(learner([cls(rampup=1)], dls=mixed(bs=1)), 'a batch of one')

@both
def test_label_outside_the_classes(cls):
    items = Items()
    items.y = items.y + 1
    learn = learner([cls(loader(Items()), rampup=1)], dls=own_dls(items))
    with pytest.raises((ValueError, FloatingPointError), match='label lies outside the 10 classes'): quiet_fit(learn, 1)

@both
@kinds
def test_wrong_number_of_outputs(cls, kind):
    learn = learner([cls(rampup=1)], dls=loaders(kind), model=partial(tiny_net, 9))
    w = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='for 10 classes; its last layer must have 10 outputs'): quiet_fit(learn, 1)
    assert differences(w, list(learn.model.parameters())) == []

@both
def test_bad_pixels(cls):
    items = Items()
    items.x[:, 0, 0, 0] = float('nan')
    refused(learner([cls(loader(items), rampup=1)], dls=own_dls()), 'the unlabelled images are not finite', error=FloatingPointError)

class Iterable(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(torch.rand(40, 1, 8, 8))

@both
@pytest.mark.parametrize('how', ['fit', 'lr_find'])
def test_images_without_a_position(cls, how):
    learn = learner([cls(TfmdDL(Iterable(), bs=8), rampup=1)], dls=own_dls())
    w = weights(learn)
    with pytest.raises(ValueError, match='unlabeled: its Iterable hands out images without a position'):
        with learn.no_bar(), learn.no_logging(): learn.fit(1) if how == 'fit' else learn.lr_find(show_plot=False)
    assert differences(w, weights(learn)) == []

@both
@pytest.mark.parametrize('second', [lambda dl, i: DIGITS.train.y[i], lambda dl, i: i + 200, lambda dl, i: i - 200,
    lambda dl, i: i.float(), lambda dl, i: i[:, None]], ids=['labels', 'beyond', 'below', 'floats', 'shape'])
def test_labels_in_place_of_positions(cls, second):
    class Wrong(ImageDL):
        def _batch(self, idx): return super()._batch(idx)[0], second(self, idx)
    dls = mixed()
    wrong = Wrong(dls.train.dataset, 20, shuffle=True, index=True, drop_last=True)
    refused(learner([cls(rampup=1)], dls=SemiDataLoaders(wrong, dls.valid)), 'dls.train: the second entry', '`mixed_dls`')

def test_other_images_than_those_of_the_table():
    cb = TemporalEnsemblingCallback(rampup=1)
    quiet_fit(learner([cb], dls=mixed()), 1)
    other = TemporalEnsemblingCallback(rampup=1)
    other.load_state_dict(cb.state_dict())
    refused(learner([other], dls=mixed(size=180)), 'checkpoint was written with 200 images, now there are 180')
    cb.stream = None
    learn = learner([cb], dls=mixed(size=180))
    refused(learn, 'the table Z is for (200, 10) images and classes, now they are (180, 10)', 'new callback')


# -- killed and resumed ---------------------------------------------------------------------------
def run(folder, cls, kind, kill=None):
    cb = cls(rampup=2, **(dict(flip=.5) if cls is PiModelCallback else {}))
    dls = mixed(bs=40) if kind == 'mixed' else digits_dls(steps=5)
    learn = learner([cb, Checkpoint(folder, every=3, keep=2)], dls=dls, model=partial(tiny_net, dropout=.3))
    return quiet_fit(learn, 3, 2e-3, cbs=kill)

@linux
@both
@kinds
@pytest.mark.parametrize('event, n', [('after_pred', 8), ('after_batch', 11), ('before_train', 2)])
def test_killed_and_resumed(cls, kind, event, n, tmp_path):
    count = [0]
    def f(cb):
        count[0] += 1
        if count[0] == n: die()
    a = run(tmp_path/'a', cls, kind)
    assert in_child(lambda: run(tmp_path/'b', cls, kind, Every(event, f))) == signal.SIGKILL
    b = run(tmp_path/'b', cls, kind)
    last = [read_checkpoint(l.checkpoint.files()[-1]) for l in (a, b)]
    assert differences(*last) == [] and differences(weights(a), weights(b)) == []
    if cls is TemporalEnsemblingCallback: assert torch.equal(a.temporal_ensembling.Z, b.temporal_ensembling.Z)

def test_foreign_checkpoints(tmp_path):
    "A run of the other method, of other data, and half a file"
    run(tmp_path/'a', PiModelCallback, 'mixed')
    with pytest.raises(ValueError, match='written by a run with callbacks'): run(tmp_path/'a', TemporalEnsemblingCallback, 'mixed')
    last = sorted((tmp_path/'a').glob('*.pt'))[-1]
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a whole checkpoint'): run(tmp_path/'a', PiModelCallback, 'mixed')


# -- the page ---------------------------------------------------------------------------------------
def test_the_example_of_the_page():
    "The lines that the page shows before the code are those that a later cell runs"
    page = json.loads((Path(__file__).parent.parent/'nbs'/'10_temporal_ensembling.ipynb').read_text())['cells']
    text = next(s for c in page if (s := ''.join(c['source'])).startswith('## The callback'))
    shown = re.search(r'```python\n(.*?)```', text, re.S)[1]
    assert any(shown.splitlines()[0] in ''.join(c['source']) for c in page if c['cell_type'] == 'code')
    names = dict(mixed_dls=mixed_dls, get_digits=lambda: DIGITS, weak_augment=weak_augment, Learner=Learner, small_cnn=small_cnn,
                 CrossEntropyLossFlat=CrossEntropyLossFlat, accuracy=accuracy, TemporalEnsemblingCallback=TemporalEnsemblingCallback)
    short = shown.replace('fit(12', 'fit(2').replace('rampup=4', 'rampup=1')
    assert short != shown
    usual = list(defaults.callbacks)
    defaults.callbacks = [o for o in usual if o is not ProgressCallback]
    try: exec(short.replace('learn.fit', 'learn.logger = len; learn.fit'), names)
    finally: defaults.callbacks = usual
    assert 'weight' in names['learn'].recorder.metric_names

def test_labels_that_look_like_positions():
    "All different in one small batch: this cannot be seen, as the page says"
    class Wrong(ImageDL):
        def _batch(self, idx): return super()._batch(idx)[0], torch.arange(len(idx))
    dls = mixed()
    wrong = Wrong(dls.train.dataset, 8, shuffle=True, index=True, drop_last=True)
    cb = TemporalEnsemblingCallback(rampup=1)
    quiet_fit(learner([cb], dls=SemiDataLoaders(wrong, dls.valid)), 1)
    assert cb.t[8:].sum() == 0


# -- fastai's own loaders -------------------------------------------------------------------------
def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def label(i): return int(DIGITS.train.y[i])

@pytest.mark.parametrize('cls, workers', [(PiModelCallback, 0), (TemporalEnsemblingCallback, 0), (TemporalEnsemblingCallback, 2)])
def test_datablock(cls, workers):
    random.seed(0), torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=label, splitter=IndexSplitter(range(40, 60)),
                      item_tfms=Resize(16), batch_tfms=aug_transforms(size=16))
    dls = block.dataloaders(list(range(60)), bs=8, num_workers=0, device='cpu')
    cb = cls(unlabeled_dl(dls, list(range(100, 160)), num_workers=workers), rampup=2, ema=.9)
    learn = quiet_fit(learner([cb], dls=dls, model=partial(tiny_net, channels=3)), 3, 1e-3)
    if cls is TemporalEnsemblingCallback:
        whole(cb)
        assert cb.Z.shape == (60, 10) and cb.t.sum() == 3*5*8
    with learn.no_bar(): assert learn.get_preds()[0].shape == (20, 10)
    cb.stream.it = None

@both
@kinds
def test_export_and_load(cls, kind, tmp_path):
    "The file holds the network and no picture, no table; predictions are the same"
    learn = quiet_fit(learner([cls(rampup=1, ema=.9)], dls=loaders(kind), path=tmp_path), 2, 1e-3)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    cb = next(c for c in again.cbs if isinstance(c, cls))
    assert cb.stream is None and getattr(cb, 'Z', None) is None
    with learn.no_bar(): was = learn.get_preds()[0]
    with again.no_bar(): now = again.get_preds(dl=again.dls.test_dl(learn.dls.valid.dataset))[0]
    torch.testing.assert_close(was, now)
