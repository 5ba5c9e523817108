"UDA: equations for any numbers, bad input, exact resume, fastai's other features, VAT, in-domain selection."
import math, random, signal
from copy import deepcopy
from functools import partial

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision as CudaMixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.augment import GaussianNoise
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unlabeled_dl
from ssl_notes.data import ImageDL, mixed_dls
from ssl_notes.randaugment import RandAugment
from ssl_notes.uda import (UDACallback, VATViews, annealed_cross_entropy, kl_rows, select_in_domain, still, tsa_threshold,
                           uda_loss, unit, vat_perturbation)

from helpers import (die, differences, DIGITS, digits_dls, Every, finite, in_child, Items, learner, linux, loader, parameters,
                     quiet_fit, refused, tiny_net, weights)

mild = RandAugment(cutout=0, fill=0.)
uda = partial(UDACallback, strong=mild, ema=.9)
STRONG = dict(uda=partial(uda, tsa='linear', threshold=.12), vat=partial(VATViews, ema=.9, threshold=.12),
              paper=partial(UDACallback, threshold=.12))

def rows(seed, n=8, c=5, scale=3.): return scale*torch.randn(n, c, generator=torch.Generator().manual_seed(seed))

def own_dls(train=None, bs=8, c=10):
    dls = DataLoaders(loader(train or Items(), bs), loader(Items(16), 8, False))
    dls.c = c
    return dls


# -- equations ------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(.05, 3.), st.floats(0, 1), st.floats(.1, 30.))
def test_uda_loss(seed, T, threshold, scale):
    "Against a loop over rows; never negative, never NaN; the mask does not know the temperature"
    weak, strong = rows(seed, scale=scale), rows(seed+1, scale=scale)
    loss, mask = uda_loss(weak, strong, T, threshold)
    total = 0.
    for w,s in zip(weak.double(), strong.double()):
        if w.softmax(0).max() > threshold:
            q = (w/T).log_softmax(0)
            total += float((q.exp()*(q - s.log_softmax(0))).sum())
    assert mask.tolist() == [float(w.softmax(0).max() > threshold) for w in weak]
    np.testing.assert_allclose(float(loss), total/len(weak), rtol=1e-3, atol=1e-5)
    assert torch.equal(uda_loss(weak, strong, 7., threshold)[1], mask)

def test_uda_loss_survives_large_logits():
    loss, _ = uda_loss(1e4*rows(0), 1e4*rows(1).requires_grad_(), .1)
    assert loss.isfinite()

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_kl_and_cross_entropy_have_one_gradient(seed):
    z, q = rows(seed).double().requires_grad_(), rows(seed+1).double().softmax(1)
    g = lambda loss: torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(g(kl_rows(q.log(), z).mean()), g(F.cross_entropy(z, q)))

@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(['linear', 'log', 'exp']), st.integers(2, 1000))
def test_tsa_grows(a, b, schedule, c):
    lo, hi = (tsa_threshold(t, schedule, c) for t in sorted((a, b)))
    assert 1/c - 1e-9 <= lo <= hi <= 1 + 1e-9

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_annealed_cross_entropy(seed, eta):
    z, y = rows(seed), torch.arange(8) % 5
    right = z.softmax(1)[range(8), y]
    keep = right <= eta
    got = annealed_cross_entropy(z, F.one_hot(y, 5).float(), eta)
    if not keep.any(): assert got == 0
    else: torch.testing.assert_close(got, F.cross_entropy(z[keep], y[keep]))

def test_threshold_is_strict():
    "A row exactly at the threshold is kept by TSA and does not count in the consistency"
    z = torch.zeros(1, 2)
    assert annealed_cross_entropy(z, torch.tensor([[1., 0]]), .5) > 0
    assert uda_loss(z, z, threshold=.5)[1] == 0


# -- selection ------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 5))
def test_select_in_domain(seed, c, n):
    p = rows(seed, 60, c).softmax(1)
    counts = p.argmax(1).bincount(minlength=c)
    if counts.min() < n:
        with pytest.raises(ValueError, match=f'n: got {n}, but only'): select_in_domain(p, n)
        return
    at = select_in_domain(p, n)
    assert len(set(at.tolist())) == n*c and p[at].argmax(1).tolist() == [k for k in range(c) for _ in range(n)]
    for k,chosen in enumerate(at.view(c, n)):
        of_class = (p.argmax(1) == k).nonzero()[:, 0]
        left = [i for i in of_class.tolist() if i not in chosen.tolist()]
        assert not left or p[chosen, k].min() >= p[left, k].max()
        assert (p[chosen, k].diff() <= 0).all()

def test_select_in_domain_bad_input():
    with pytest.raises(ValueError, match='expected'): select_in_domain(torch.rand(5), 1)
    with pytest.raises(ValueError, match='expected'): select_in_domain(torch.rand(5, 2), 0)


# -- VAT ------------------------------------------------------------------------------------------
class Noise(nn.Module):
    def forward(self, x): return x + torch.randn_like(x) if self.training else x

def noisy_net(): return nn.Sequential(Noise(), *tiny_net(dropout=.5).children())

def images(n=8): return DIGITS.test.x[:n]/255.

def test_perturbation_leaves_the_model_alone():
    torch.manual_seed(0)
    net = noisy_net().train()
    frozen = net[2]
    frozen.eval()
    for p in net.parameters(): p.grad = torch.ones_like(p)
    before, modes = weights(net), [m.training for m in net.modules()]
    x, d = images(), torch.randn(8, 1, 8, 8)
    r = vat_perturbation(net, x, d, eps=2.)
    assert differences(before, weights(net)) == [] and modes == [m.training for m in net.modules()]
    assert all((p.grad == 1).all() for p in net.parameters()) and not r.requires_grad and not x.requires_grad
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((8,), 2.), rtol=1e-3, atol=0)
    assert torch.equal(r, vat_perturbation(net, x, d, eps=2.)), 'noise of the network reached the search'

def test_still_is_undone_after_an_error():
    net = noisy_net().train()
    with pytest.raises(KeyError):
        with still(net): raise KeyError
    assert all(m.training for m in net.modules()) and net[2].track_running_stats

def test_perturbation_in_mixed_precision_and_no_grad():
    torch.manual_seed(0)
    net, x, d = tiny_net().train(), images(), torch.randn(8, 1, 8, 8)
    expected = vat_perturbation(net, x, d)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(vat_perturbation(net, x, d), expected)

@pytest.mark.parametrize('n_iter', [1, 3])
def test_perturbation_against_the_hessian(n_iter):
    "Power iteration with the exact second derivative, in double precision"
    torch.manual_seed(0)
    W = torch.randn(4, 6)
    net = nn.Linear(6, 4, bias=False)
    net.weight.data = W
    x, d = torch.randn(1, 6), torch.randn(1, 6)
    p = (W.double() @ x[0].double()).softmax(0)
    H = W.T.double() @ (p.diag() - p.outer(p)) @ W.double()
    v = d[0].double()
    for _ in range(n_iter): v = H @ v/(H @ v).norm()
    torch.testing.assert_close(vat_perturbation(net, x, d, 1., n_iter=n_iter)[0].double(), v, rtol=1e-2, atol=3e-3)

@pytest.mark.parametrize('kw, words', [(dict(eps=-1.), 'eps, xi: got -1.0'), (dict(xi=0.), 'xi above 0'), (dict(n_iter=0), 'n_iter: got 0'),
    (dict(eps=float('nan')), 'eps, xi: got nan'), (dict(n_iter=1.5), 'n_iter: got 1.5')], ids=str)
def test_vat_arguments(kw, words):
    with pytest.raises(ValueError, match=words): vat_perturbation(tiny_net(), images(), images(), **kw)
    with pytest.raises(ValueError, match=words): VATViews(**kw)

def test_vat_views():
    "The clean view is unchanged, its neighbour lies at the distance asked for; the draws are the stream's own"
    seen = []
    for seed in (0, 0, 1):
        learn = learner([VATViews(eps=2., ema=None, seed=seed)])
        quiet_fit(learn, 1, cbs=Every('after_pred', lambda cb: seen.append(cb.xb[0].detach().clone())))
    a, clean, near = seen[0].split(8)
    torch.testing.assert_close((near - clean).flatten(1).norm(dim=1), torch.full((8,), 2.), rtol=1e-3, atol=0)
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[0][16:], seen[8][16:])


# -- arguments ------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(T=0), dict(T=-1), dict(T=float('nan')), dict(T=float('inf')), dict(threshold=-.1), dict(threshold=1.1),
    dict(threshold=float('nan')), dict(lambda_u=-1), dict(lambda_u=float('nan')), dict(lambda_u=float('inf')), dict(tsa='cosine'), dict(tsa=True),
    dict(ema=1.5), dict(ema=float('nan'))], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    for cls in (UDACallback, VATViews):
        with pytest.raises(ValueError) as e: cls(**kw)
        assert str(e.value).startswith(f'{name}: got') and repr(value) in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('strong', ['cifar', 3, [mild]], ids=str)
def test_strong_is_no_function(strong):
    with pytest.raises(TypeError, match='strong: got'): UDACallback(strong=strong)


# -- data -----------------------------------------------------------------------------------------
def test_no_unlabelled_data(): refused(learner([uda()], dls=own_dls()), 'unlabeled: UDACallback has no unlabelled data')

def test_mixed_batches_are_refused():
    dls = mixed_dls(DIGITS, 40, bs=16, steps=4, valid=40, device='cpu')
    refused(learner([uda()], dls=dls), 'dls.train: it mixes known and unknown labels', '`get_dls`')

def test_float_images_have_no_strong_view():
    "RandAugment works on bytes: a loader whose items are floats already is told so"
    refused(learner([uda(loader(Items()))], dls=own_dls()), 'strong: it works on uint8 images', 'float32', error=TypeError)

@pytest.mark.parametrize('kw, words', [(dict(shape=(1, 12, 12)), '(1, 12, 12)'), (dict(shape=(3, 8, 8)), '(3, 8, 8)'),
                                       (dict(dtype=torch.float64), 'float64')], ids=str)
def test_unlike_images(kw, words):
    refused(learner([VATViews(loader(Items(**kw)))], dls=own_dls()), 'unlabeled: its images are', 'both must be alike', words)

def test_unlabelled_set_smaller_than_its_batch():
    refused(learner([uda(ImageDL(DIGITS.train.subset(slice(5)), 8, index=True))]), 'unlabeled: 5 images do not fill one batch of 8')

def test_batch_of_one():
    refused(learner([VATViews(loader(Items(), 8))], dls=own_dls(bs=1)), 'dls.train: a batch of one labelled image')
    refused(learner([VATViews(loader(Items(), 1))], dls=own_dls()), 'unlabeled: its batch size is 1')

def test_label_outside_the_classes():
    items = Items()
    items.y = items.y + 5
    refused(learner([VATViews(loader(Items()))], dls=own_dls(items)), 'step 0', 'label lies outside the 10 classes')

@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
def test_bad_pixels(where):
    both = dict(labelled=Items(), unlabelled=Items(seed=1))
    both[where].x[:, 0, 3, 3] = float('nan')
    learn = learner([VATViews(loader(both['unlabelled']))], dls=own_dls(both['labelled']))
    refused(learn, f'step 0: the {where} images are not finite', error=FloatingPointError)

def test_bad_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = tiny_net(), 0
        def forward(self, x):
            self.calls += self.training
            return self.net(x)*(float('nan') if self.calls > 2 else 1.)
    learn = learner([uda()], model=Net)
    with pytest.raises(FloatingPointError, match='step 2: the loss term loss_x is not finite'): quiet_fit(learn, 1)
    assert learn.uda.n_step == 2

@pytest.mark.parametrize('c', [1, 9, 11])
@pytest.mark.parametrize('kind', ['uda', 'vat'])
def test_wrong_number_of_outputs(kind, c):
    refused(learner([STRONG[kind]()], model=partial(tiny_net, c)), 'model: it gives an output of shape', 'must have 10 outputs')


# -- one step -------------------------------------------------------------------------------------
def test_unequal_batches_and_one_forward():
    "Any ratio; one forward sees all rows"
    calls = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()
        def forward(self, x):
            if self.training: calls.append(len(x))
            return self.net(x)
    learn = quiet_fit(learner([uda()], dls=digits_dls(6, ubs=14), model=Net), 1)
    assert calls == [6 + 14 + 14]*4 and np.isfinite(learn.recorder.losses).all()

def test_hidden_labels_change_nothing_but_their_column():
    "Diagnostics only: the same run with the labels taken away"
    def go(hide):
        dls = digits_dls()
        if hide: dls.unlabeled.dataset.y = torch.full_like(dls.unlabeled.dataset.y, -1)
        learn = quiet_fit(learner([uda(threshold=.1)], dls=dls), 2, 1e-2)
        return learn, dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    (a, cols), (b, without) = go(False), go(True)
    assert differences(weights(a), weights(b)) == []
    assert np.isnan(without['right_rate']) and 0 < cols['right_rate'] <= cols['mask_rate'] == without['mask_rate']

@pytest.mark.parametrize('tsa', [None, 'linear', 'log', 'exp'])
def test_tsa_rate(tsa):
    "Without a schedule every row counts; with one, the columns are shares"
    learn = quiet_fit(learner([uda(tsa=tsa)]), 2, 1e-2)
    rate = [v[learn.recorder.metric_names.index('tsa_rate')-1] for v in learn.recorder.values]
    assert rate == [1, 1] if tsa is None else all(0 <= r <= 1 for r in rate)
    if tsa == 'exp': assert min(rate) < 1

def test_zero_weight_is_supervised_training_on_more_batch_statistics():
    "With lambda_u=0 no gradient comes from the consistency"
    grads = []
    for kw in (dict(lambda_u=0.), dict(threshold=1.)):
        keep = Every('before_step', lambda cb: grads.append([p.grad.clone() for p in cb.model.parameters()]))
        quiet_fit(learner([uda(**kw)]), 1, cbs=keep)
    assert differences(grads[:4], grads[4:]) == []

def test_teacher_averages_buffers():
    learn = quiet_fit(learner([uda()]), 1)
    assert learn.ema_teacher.buffers == 'average' and learn.ema_teacher.decay == .9
    assert UDACallback().ema == .9999

def test_own_teacher_stays():
    learn = quiet_fit(learner([EMATeacher(.5), uda()]), 1)
    assert learn.ema_teacher.decay == .5


# -- resume ---------------------------------------------------------------------------------------
def whole_run(kind, folder, cbs=None):
    learn = learner([STRONG[kind](), Checkpoint(folder, every=3, keep=2)], dls=digits_dls(steps=5))
    return quiet_fit(learn, 2, 2e-3, cbs=cbs)

@linux
@pytest.mark.parametrize('kind, event, n', [('uda', 'after_loss', 5), ('uda', 'before_batch', 8), ('paper', 'after_step', 7), ('vat', 'after_pred', 5),
                                            ('vat', 'after_batch', 9)])
def test_killed_and_resumed(kind, event, n, tmp_path):
    expected = read_checkpoint(whole_run(kind, tmp_path/'a').checkpoint.files()[-1])
    count = [0]
    def kill(cb):
        count[0] += 1
        if count[0] == n: die()
    assert in_child(lambda: whole_run(kind, tmp_path/'b', Every(event, kill))) == signal.SIGKILL
    got = read_checkpoint(whole_run(kind, tmp_path/'b').checkpoint.files()[-1])
    assert differences(expected, got) == []

def test_other_data_or_damaged_checkpoint(tmp_path):
    learn = whole_run('uda', tmp_path/'a')
    state = learn.uda.state_dict()
    other = uda(ImageDL(DIGITS.train.subset(slice(100)), 8, index=True, steps=4))
    other.load_state_dict(deepcopy(state))
    with pytest.raises(ValueError, match='now there are 100'): quiet_fit(learner([other]), 1)
    f = learn.checkpoint.files()[-1]
    f.write_bytes(f.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a whole checkpoint'): whole_run('uda', tmp_path/'a')


# -- with the rest of fastai ----------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['uda', 'vat'])
def test_lr_find_changes_nothing(kind):
    a, b = (quiet_fit(learner([STRONG[kind]()]), 1) for _ in range(2))
    with b.no_bar(): b.lr_find(num_it=6, show_plot=False)
    own = lambda l: next(cb for cb in l.cbs if isinstance(cb, UDACallback)).state_dict()
    assert differences(weights(a), weights(b)) == [] and differences(own(a), own(b), skip=('sums',)) == []
    assert differences(a.ema_teacher.state_dict(), b.ema_teacher.state_dict()) == []

@pytest.mark.parametrize('kind', ['uda', 'vat', 'paper'])
def test_export(kind, tmp_path):
    learn = learner([STRONG[kind]()], path=tmp_path)
    quiet_fit(learn, 1)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    x = DIGITS.test.subset(slice(20))
    with learn.no_bar(), again.no_bar():
        was, now = (l.get_preds(dl=ImageDL(x, 10))[0] for l in (learn, again))
    assert torch.equal(was, now)

def test_gradient_accumulation():
    learn = quiet_fit(learner([uda(), GradientAccumulation(16)]), 2)
    assert learn.uda.n_step == 4 == learn.ema_teacher.n_updates   # 8 batches of 8

class MixedPrecision(CudaMixedPrecision):
    "fastai's, which knows CUDA alone, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

@pytest.mark.parametrize('kind', ['uda', 'vat'])
def test_mixed_precision(kind):
    "The forward of all rows in bf16, VAT's search and the losses in fp32"
    seen, inside = [], []
    learn = learner([STRONG[kind](), MixedPrecision(AMPMode.BF16)], opt_func=partial(SGD, mom=.9))
    h = learn.model[-1].register_forward_hook(lambda m, i, o: inside.append((len(o), o.dtype)) if m.training else None)
    method = next(cb for cb in learn.cbs if isinstance(cb, UDACallback))
    quiet_fit(learn, 1, 1e-2, cbs=Every('after_pred', lambda cb: seen.append((method.total.dtype, cb.pred.dtype))))
    h.remove()
    assert set(seen) == {(torch.float32,)*2}
    assert set(inside) == {(24, torch.bfloat16)} | ({(8, torch.float32)} if kind == 'vat' else set())
    assert not torch.is_autocast_enabled('cpu') and np.isfinite(learn.recorder.losses).all()

def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

@pytest.mark.parametrize('strong', [None, GaussianNoise(.1)], ids=str)
def test_ordinary_datablock(strong):
    "A `DataBlock`, `unlabeled_dl` and a `vision_learner`; RandAugment is done to the bytes, before the batch transforms"
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(40, 60)), item_tfms=Resize(32), batch_tfms=aug_transforms(size=32))
    dls = block.dataloaders(list(range(60)), bs=8, num_workers=0, device='cpu')
    unl = unlabeled_dl(dls, list(range(100, 160)), bs=16, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=UDACallback(unl, strong, ema=.9))
    types, real = [], learn.uda.strong
    def look(x, generator):
        types.append((x.dtype, tuple(x.shape)))
        return real(x, generator)
    learn.uda.strong = look
    quiet_fit(learn, 1, 1e-3)
    assert types and set(types) == {(torch.uint8, (16, 3, 32, 32))}
    assert finite(learn) and learn.recorder.metric_names[3:-1] == [*UDACallback.terms]

@pytest.mark.parametrize('kind', ['uda', 'vat'])
def test_no_trace_after_cancel(kind):
    learn = learner()
    before, n = parameters(learn), len(learn.cbs)
    def stop(cb): raise CancelFitException
    quiet_fit(learn, 1, cbs=[STRONG[kind](), Every('after_pred', stop)])
    assert len(learn.cbs) == n and not hasattr(learn, 'ema_teacher')
    assert differences(before, parameters(learn)) == []
