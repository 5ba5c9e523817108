"Pseudo-label: the loss against brute force, bad input, no trace, exact resume, an ordinary fastai Learner."
import math, random
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.augment import RandomCrop, Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.augment import weak_augment
from ssl_notes.core import Checkpoint, read_checkpoint, unlabeled_dl
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.pseudo_label import PseudoLabelCallback, best_guess, pseudo_label_loss, pseudo_label_weight

from helpers import DIGITS, Every, content, die, differences, digits_dls, in_child, learner, linux, quiet_fit, tiny_net, weights

now = partial(PseudoLabelCallback, t1=0, t2=0)   # full weight from the first update on


# -- the equations --------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 12), st.integers(2, 6), st.none() | st.floats(0, 1), st.floats(.1, 8))
def test_loss_and_gradient_row_by_row(seed, n, c, threshold, scale):
    z = (torch.randn(n, c, generator=torch.Generator().manual_seed(seed))*scale).double().requires_grad_()
    loss, mask = pseudo_label_loss(z, threshold)
    p, total, grad = z.detach().softmax(1), 0., torch.zeros(n, c).double()
    for i in range(n):
        k = int(p[i].argmax())
        keep = threshold is None or float(p[i, k]) > threshold
        assert bool(mask[i]) == keep
        if keep:
            total -= math.log(float(p[i, k]))/n
            grad[i] = p[i]/n
            grad[i, k] -= 1/n
    assert abs(float(loss) - total) < 1e-9
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], grad)

@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1000), st.floats(0, 10), st.floats(0, 500), st.floats(0, 500))
def test_weight(t, alpha, t1, more):
    w = pseudo_label_weight(t, alpha, t1, t1 + more)
    assert 0 <= w <= alpha
    if t < t1: assert w == 0
    if t >= t1 + more: assert w == alpha
    assert w <= pseudo_label_weight(t + 1, alpha, t1, t1 + more)

def test_published_numbers():
    z = torch.tensor([[4., 0, 0], [1, 0, 0], [0, 5, 0]])
    loss, mask = pseudo_label_loss(z, .95)
    assert abs(loss - 0.016454067) < 1e-7 and mask.tolist() == [1, 0, 1]
    assert [pseudo_label_weight(t) for t in (0, 100, 350, 600, 700)] == [0, 0, 1.5, 3, 3]

def test_threshold_is_strict():
    assert pseudo_label_loss(torch.zeros(1, 2), .5)[1].tolist() == [0]
    assert pseudo_label_loss(torch.zeros(1, 2), math.nextafter(.5, 0) - 1e-7)[1].tolist() == [1]

@pytest.mark.parametrize('f', [lambda z: pseudo_label_loss(z)[0], lambda z: pseudo_label_loss(z, .4)[0]])
def test_guess_is_a_constant(f):
    "The gradient is the same whether or not the guess is computed beforehand"
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = z.detach().argmax(1)
    keep = (z.detach().softmax(1).amax(1) > .4).float() if f(z) != pseudo_label_loss(z)[0] else torch.ones(9)
    fixed = (F.cross_entropy(z, y, reduction='none')*keep).mean()
    torch.testing.assert_close(torch.autograd.grad(f(z), z)[0], torch.autograd.grad(fixed, z)[0])


# -- bad input ------------------------------------------------------------------------------------
class Items:
    def __init__(self, n=40, shape=(1, 8, 8), dtype=torch.float32, c=10):
        self.x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)).to(dtype)
        self.labels = torch.arange(n) % c
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.labels[i]

def loader(items, bs=8, shuffle=True): return TfmdDL(items, bs=bs, shuffle=shuffle, drop_last=shuffle, num_workers=0)

def own_dls(train=None, bs=8):
    dls = DataLoaders(loader(train or Items(), bs), loader(Items(16), 8, False))
    dls.c = 10
    return dls

def refused(learn, *words, error=ValueError, n_epoch=1, skip=()):
    "The message has all `words`, and nothing of the model has changed, except what `skip` names."
    w = weights(learn)
    with pytest.raises(error) as e: quiet_fit(learn, n_epoch, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    assert differences(w, weights(learn), skip=skip) == []

@pytest.mark.parametrize('kw, says', [
    (dict(alpha_f=-1), 'alpha_f: got -1'), (dict(alpha_f=math.nan), 'alpha_f: got nan'), (dict(alpha_f=math.inf), 'alpha_f: got inf'),
    (dict(t1=-1), 't1, t2: got -1'), (dict(t1=7, t2=6), 't1, t2: got 7, 6'), (dict(t2=math.nan), 't1, t2'), (dict(t1=math.nan), 't1, t2'),
    (dict(threshold=-.1), 'threshold: got -0.1'), (dict(threshold=1.01), 'threshold: got 1.01'), (dict(threshold=math.nan), 'threshold: got nan'),
    (dict(ema=1.5), 'ema: got 1.5'), (dict(batchnorm='interleave'), "batchnorm: got 'interleave', expected 'separate' or 'joint'")], ids=str)
def test_arguments(kw, says):
    with pytest.raises(ValueError, match='expected') as e: PseudoLabelCallback(**kw)
    assert says in str(e.value)

def test_ramp_longer_than_the_training():
    refused(learner([PseudoLabelCallback()]), 't2: got 600 epochs, but the training has 1', 'give t2=')
    refused(learner([PseudoLabelCallback(t1=1, t2=4)]), 't2: got 4 epochs', n_epoch=3)
    quiet_fit(learner([PseudoLabelCallback(t1=1, t2=3)]), 3)

def test_no_unlabelled_data():
    refused(learner([now()], dls=own_dls()), 'unlabeled: PseudoLabelCallback has no unlabelled data', 'unlabeled_dl(dls')

def test_mixed_batches_are_refused():
    dls = mixed_dls(DIGITS, 40, bs=16, valid=40, augment=weak_augment('digits'), device='cpu')
    refused(learner([now()], dls=dls), 'dls.train: it mixes known and unknown labels', '`get_dls`')

@pytest.mark.parametrize('what', [torch.zeros(9, 1, 8, 8), 'folder', DIGITS.train])
def test_unlabelled_is_no_loader(what): refused(learner([now(what)]), 'unlabeled: got a', error=TypeError)

@pytest.mark.parametrize('kw', [dict(shape=(1, 12, 12)), dict(shape=(3, 8, 8)), dict(dtype=torch.float64), dict(dtype=torch.uint8)], ids=str)
@pytest.mark.parametrize('batchnorm', ['separate', 'joint'])
def test_unlike_images(kw, batchnorm):
    refused(learner([now(loader(Items(**kw)), batchnorm=batchnorm)], dls=own_dls()), 'unlabeled: its images are', 'both must be alike')

def test_sizes():
    refused(learner([now(loader(Items(5), 8, False))], dls=own_dls()), 'unlabeled: 5 images do not fill one batch of 8', 'bs=5')
    refused(learner([now(loader(Items()))], dls=own_dls(bs=1)), 'dls.train: a batch of one labelled image')
    refused(learner([now(loader(Items(), 1))], dls=own_dls()), 'unlabeled: its batch size is 1')

@pytest.mark.parametrize('batchnorm', ['separate', 'joint'])
@pytest.mark.parametrize('bs, ubs', [(8, 20), (8, 4)])
def test_unequal_batches_are_fine(bs, ubs, batchnorm):
    learn = quiet_fit(learner([now(batchnorm=batchnorm)], dls=digits_dls(bs, ubs=ubs)), 1, 1e-3)
    assert np.isfinite(learn.recorder.losses).all() and learn.pseudo_label.n_step == 4

@pytest.mark.parametrize('label', [10, -1])
def test_label_outside_the_classes(label):
    items = Items()
    items.labels[:] = label
    refused(learner([now(loader(Items()))], dls=own_dls(items)), 'step 0', 'label lies outside the 10 classes', error=(ValueError, FloatingPointError))

@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_bad_pixels(where, bad):
    a, b = Items(), Items(48)
    dict(labelled=a, unlabelled=b)[where].x[:, 0, 3, 3] = bad
    refused(learner([now(loader(b))], dls=own_dls(a)), f'step 0: the {where} images are not finite', error=FloatingPointError)

def test_bad_loss():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()
        def forward(self, x): return self.net(x)*(math.nan if self.training else 1.)
    with pytest.raises(FloatingPointError, match='step 0: the loss term loss_x is not finite'):
        quiet_fit(learner([now()], model=Broken), 1)

@pytest.mark.parametrize('batchnorm', ['separate', 'joint'])
def test_wrong_number_of_outputs(batchnorm):
    refused(learner([now(batchnorm=batchnorm)], model=partial(tiny_net, 9)), 'for 10 classes', 'must have 10 outputs',
            skip=('1.running_mean', '1.running_var', '1.num_batches_tracked'))   # one forward was made


# -- what happens in training ---------------------------------------------------------------------
def column(learn, name): return [dict(zip(list(learn.recorder.metric_names)[1:-1], v))[name] for v in learn.recorder.values]

def test_weight_follows_the_epochs():
    "The column is the mean of the schedule over the updates of each epoch"
    learn = quiet_fit(learner([PseudoLabelCallback(alpha_f=2., t1=1, t2=3)]), 4)
    want = [np.mean([pseudo_label_weight(e + i/4, 2., 1, 3) for i in range(4)]) for e in range(4)]
    np.testing.assert_allclose(column(learn, 'weight'), want, rtol=1e-6)

def test_columns():
    learn = quiet_fit(learner([now()]), 1)
    assert column(learn, 'mask_rate') == [1.] and 0 <= column(learn, 'right_rate')[0] <= 1
    learn = quiet_fit(learner([now(threshold=.999)]), 1)
    assert column(learn, 'mask_rate') == [0.] == column(learn, 'right_rate') == column(learn, 'loss_u')

def test_hidden_labels_are_for_the_eye_only():
    "Other hidden labels, or none: the column differs, the weights do not"
    def run(y):
        dls = digits_dls()
        if y is not None: dls.unlabeled.dataset.y[:] = y
        return quiet_fit(learner([now()], dls=dls), 2, 1e-2)
    a, b, c = run(None), run(3), run(-1)
    assert differences(weights(a), weights(b)) == [] == differences(weights(a), weights(c))
    assert column(a, 'right_rate') != column(b, 'right_rate') and np.isnan(column(c, 'right_rate')).all()

def test_no_weight_is_supervised_training():
    "With `batchnorm='separate'` and no weight, the labelled part is ordinary training"
    a = quiet_fit(learner([now(alpha_f=0.)]), 2, 1e-2)
    b = quiet_fit(learner(), 2, 1e-2)
    assert differences(weights(a), weights(b)) == []

@pytest.mark.parametrize('batchnorm', ['separate', 'joint'])
def test_statistics_of_batchnorm(batchnorm):
    "The running mean after one step is that of the first forward alone"
    seen = []
    learn = learner([now(batchnorm=batchnorm)], dls=digits_dls(steps=1))
    bn = learn.model[1]
    bn.momentum = 1.
    def look(m, i):
        if m.training: seen.append((len(i[0]), i[0].detach().mean((0, 2, 3))))
    bn.register_forward_pre_hook(look)
    quiet_fit(learn, 1)
    assert [n for n,_ in seen] == ([8, 8] if batchnorm == 'separate' else [16])
    torch.testing.assert_close(bn.running_mean, seen[0][1])

@pytest.mark.parametrize('cancel', [False, True])
def test_leaves_no_trace(cancel):
    from fastai.callback.core import CancelFitException
    def stop(cb): raise CancelFitException
    learn = learner()
    def things(): return [type(o) for o in learn.cbs], *map(id, (learn.loss_func, learn.model, learn.dls, *learn.metrics))
    before = things()
    quiet_fit(learn, 1, cbs=[now(ema=.9)] + [Every('after_pred', stop)]*cancel)
    learn.remove_cbs(Every)
    assert things() == before and not hasattr(learn, 'ema_teacher')

def test_lets_go_of_the_last_batch():
    learn = quiet_fit(learner([now()]), 1)
    assert not {'total', 'targets', 'chunks', 'idx'} & vars(learn.pseudo_label).keys()

def test_lr_find_changes_nothing():
    a, b = learner([now(ema=.9)]), learner([now(ema=.9)])
    for l in (a, b): quiet_fit(l, 1)
    with b.no_bar(): b.lr_find(num_it=10, show_plot=False)
    assert differences(weights(a), weights(b)) == []
    assert differences(a.pseudo_label.state_dict(), b.pseudo_label.state_dict(), skip=('sums',)) == []

def test_lr_find_with_a_long_ramp():
    learn = learner([PseudoLabelCallback()])
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)

def test_accumulated_gradients():
    learn = quiet_fit(learner([now(), GradientAccumulation(16)]), 2)
    assert learn.pseudo_label.n_step == 4

class MixedPrecision(CudaMixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('batchnorm', ['separate', 'joint'])
def test_mixed_precision(batchnorm):
    seen = []
    learn = learner([now(batchnorm=batchnorm, threshold=.1), MixedPrecision(AMPMode.BF16)], opt_func=partial(SGD, mom=.9))
    def look(m, i, o):
        if m.training: seen.append(o.dtype)
    h = learn.model[-1].register_forward_hook(look)
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_pred', lambda cb: seen.append(cb.pseudo_label.total.dtype)))
    h.remove()
    assert set(seen) == {torch.bfloat16, torch.float32} and np.isfinite(learn.recorder.losses).all()

def test_export(tmp_path):
    learn = quiet_fit(learner([now(ema=.9)], path=tmp_path), 1, 1e-2)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    with learn.no_bar(), again.no_bar():
        a, b = (l.get_preds(dl=l.dls.test_dl(DIGITS.test.x[:20]))[0] for l in (learn, again))
    assert torch.equal(a, b)


# -- killed and resumed ---------------------------------------------------------------------------
def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def two_stream(folder, **kw):
    cb = PseudoLabelCallback(t1=.5, t2=2, threshold=.15, **kw)
    return learner([cb, Checkpoint(folder, every=3, keep=2)], dls=digits_dls(steps=5), model=partial(tiny_net, dropout=.3))

def from_datablock(folder, cbs=None, model=partial(tiny_net, channels=3)):
    "fastai's own loaders with random transforms; nothing is known about the unlabelled images"
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(40, 60)), item_tfms=[Resize(16), RandomCrop(14)], batch_tfms=aug_transforms(size=14))
    dls = block.dataloaders(list(range(60)), bs=8, num_workers=0, device='cpu')
    cb = PseudoLabelCallback(unlabeled_dl(dls, list(range(100, 160)), num_workers=0), t1=.5, t2=2)
    return learner([cb, Checkpoint(folder, every=3, keep=2)], dls=dls, model=model)

RUNS = dict(separate=two_stream, joint=partial(two_stream, batchnorm='joint', ema=.9), datablock=from_datablock)

@linux
@pytest.mark.parametrize('run, event, n', [('separate', 'after_loss', 4), ('separate', 'before_batch', 11), ('joint', 'after_step', 8),
                                           ('joint', 'after_pred', 13), ('datablock', 'after_pred', 7)])
def test_killed_and_resumed(run, event, n, tmp_path):
    def fit(d, cbs=None):
        learn = quiet_fit(RUNS[run](tmp_path/d), 3, 2e-3, cbs=cbs)
        return read_checkpoint(learn.checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        count[0] += 1
        if count[0] == n: die()
    whole = fit('a')
    assert in_child(lambda: fit('b', Every(event, kill))) == 9
    nan = ('sums', 'recorder') if run == 'datablock' else ()   # nan, the right rate where no truth is known, differs from itself
    assert differences(whole, fit('b'), skip=nan) == []

def test_other_or_damaged_checkpoints(tmp_path):
    "Refused, and the file stays as it is"
    ck = tmp_path/'ck'
    def stop(cb):
        if cb.train_iter == 8: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet_fit(two_stream(ck), 3, 2e-3, cbs=Every('after_batch', stop))
    newest = max(ck.glob('step_*'))
    def resumed(learn, match):
        before = content(ck)
        with pytest.raises(ValueError, match=match): quiet_fit(learn, 3, 2e-3)
        assert content(ck) == before
    other = digits_dls(steps=5)
    other.unlabeled = ImageDL(DIGITS.train.subset(slice(100)), 8, index=True, repeat=True, augment=weak_augment('digits'))
    resumed(learner([PseudoLabelCallback(t1=.5, t2=2), Checkpoint(ck)], dls=other, model=partial(tiny_net, dropout=.3)), '100')
    whole = newest.read_bytes()
    for bad in (whole[:2000], b'something else'):
        newest.write_bytes(bad)
        resumed(two_stream(ck), 'not a whole checkpoint')


# -- an ordinary fastai Learner -------------------------------------------------------------------
def test_vision_learner(tmp_path):
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(24, 32)), item_tfms=Resize(32), batch_tfms=aug_transforms(size=32))
    dls = block.dataloaders(list(range(32)), bs=12, num_workers=0, device='cpu')
    cb = PseudoLabelCallback(unlabeled_dl(dls, list(range(100, 140)), num_workers=0), t1=.3, t2=1)
    learn = vision_learner(dls, resnet18, weights=None, pretrained=False, metrics=accuracy, cbs=cb)
    before = weights(learn)
    quiet_fit(learn, 2, 1e-3)
    assert differences(before, weights(learn)) and np.isfinite(learn.recorder.losses).all()
    assert np.isnan(column(learn, 'right_rate')).all() and column(learn, 'mask_rate') == [1., 1.]
    with learn.no_bar(), learn.no_logging(): assert len(learn.predict(picture(3))) == 3 and len(learn.validate()) == 2
