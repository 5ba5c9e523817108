"Augmented CycleGAN: pairs of sets and their loader, steps of some networks alone, all forms, faults, resume, processes."
import math, warnings
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from fastai.callback.core import CancelFitException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import lr_find   # noqa: F401, patches Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.optimizer import Adam, SGD, ranger
from fastai.torch_core import TensorImage
from fastai.vision.data import ImageBlock

from ssl_notes.augment import RandomFlip
from ssl_notes.augmented_cyclegan import (FORMS, AugmentedCycleGAN, AugmentedCycleGANCallback, CycleLoss, PairDL, PairSet, PartStep,
    SamplePictures, augmented_cyclegan, colored_digits, coverage, cycle_terms, cyclegan_adam, cyclegan_learner, cyclegan_schedule,
    d_loss, decay_after, evaluating, g_loss, hue, hue_error, ink, judge, latent_error, made, mse_a, noise_sensitivity, pair_dls,
    pair_folders, shapes, sheet, transfer, translations)
from ssl_notes.core import Checkpoint, EMATeacher, unwrap
from ssl_notes.data import ImageSet
from ssl_notes.models import CondInstanceNorm, CycleGenerator, PairEncoder, cond_instance_norm

from helpers import DIGITS, Every, differences, gloo, linux, quiet_fit, seeded, two_processes, weights

TEST = shapes(12, seed=3)
TRAIN = shapes(40, seed=1).unpaired(shapes(40, seed=2))
unit = lambda x: x.float()/127.5 - 1

def net(form='paper', d=2, width=.07, **kw): return augmented_cyclegan(16, d, form, width, **kw)

def learner(form='paper', cbs=None, steps=4, bs=4, train=TRAIN, valid=TEST, seed=0, model=None, opt_func=cyclegan_adam, **kw):
    torch.manual_seed(seed)
    dls = pair_dls(train, valid, bs, steps, seed, device='cpu')
    return cyclegan_learner(dls, AugmentedCycleGANCallback(seed=seed, **kw), model or net(form, seed=seed), cbs, opt_func)

def nan_like(a, b): return (a != a) == (b != b)

# ------------------------------------------------------------------------------------------------- sets and loaders
def numbered(n, m=None, paired=False):
    x = lambda k: torch.arange(k, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return PairSet(x(n), x(m or n), paired)

def values(x): return x[:, 0, 0, 0].add(1).mul(127.5).round().long().tolist()

@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 30), m=st.integers(1, 30), bs=st.integers(1, 4), seed=st.integers(0, 2**31), before=st.integers(0, 12), after=st.integers(1, 12))
def test_stream_of_unpaired_sets_resumes_anywhere_and_uses_all_equally(n, m, bs, seed, before, after):
    make = lambda: PairDL(numbered(n, m), bs, steps=3, seed=seed)
    one, two = make(), make()
    seen = [tuple(map(values, one.next_batch())) for _ in range(before)]
    two.load_state_dict(one.state_dict())
    rest = [tuple(map(values, one.next_batch())) for _ in range(after)]
    assert rest == [tuple(map(values, two.next_batch())) for _ in range(after)]
    for k,size in ((0, n), (1, m)):
        counts = np.bincount([v for o in seen + rest for v in o[k]], minlength=size)
        assert counts.max() - counts.min() <= 1      # an endless deck of cards

def test_orders_of_a_and_b_have_nothing_to_do_with_one_another():
    a, b = zip(*[tuple(map(values, o)) for _ in range(30) for o in PairDL(numbered(40), 40, steps=1, seed=5)])
    a, b = np.array(a), np.array(b)
    assert (a == a[0]).all() and (b == b[0]).all()   # a loader starts with its seed
    dl = PairDL(numbered(40), 40, steps=1, seed=5)
    same = [np.equal(*map(values, dl.next_batch())).mean() for _ in range(200)]
    assert abs(np.mean(same) - 1/40) < .01
    other = values(PairDL(numbered(40), 40, steps=1, seed=6).next_batch()[1])
    assert other != b[0].tolist()

@pytest.mark.parametrize('paired', [False, True])
def test_one_pass_and_shuffled_pass(paired):
    data = numbered(10, paired=paired)
    plain = [tuple(map(values, o)) for o in PairDL(data, 4)]
    assert [len(a) for a,_ in plain] == [4, 4, 2] and sum((a for a,_ in plain), []) == list(range(10))
    assert all(a == b for a,b in plain)              # of unpaired sets too: position by position
    mixed = [tuple(map(values, o)) for o in PairDL(data, 4, shuffle=True)]
    assert sorted(sum((a for a,_ in mixed), [])) == list(range(10)) == sorted(sum((b for _,b in mixed), []))
    assert all(a == b for a,b in mixed) == paired
    short = PairDL(numbered(7, 3), 4)
    assert sum((values(b) for _,b in short), []) == [0, 1, 2, 0, 1, 2, 0]

def test_positions_can_be_dealt_out_as_a_distributed_sampler_does():
    dl, ref = (PairDL(numbered(9, 5), 3, steps=4, seed=1) for _ in range(2))
    idxs = dl.get_idxs()
    assert len(idxs) == 12 and all(isinstance(i, int) for i in idxs)
    got = [tuple(map(values, o)) for o in dl.create_batches(idxs)]
    assert got == [tuple(map(values, ref._batch(torch.tensor(idxs[i:i+3])))) for i in range(0, 12, 3)]

def test_a_set_moves_as_a_whole_and_is_cut_as_pairs():
    meta = TEST.to('meta')
    assert (meta.x.device.type, meta.b.device.type, meta.paired) == ('meta', 'meta', True)
    assert TEST.to('cpu') is TEST
    part = TEST.subset(torch.tensor([5, 3]))
    assert torch.equal(part.b, TEST.b[[5, 3]]) and part.factors['hue'].tolist() == TEST.factors['hue'][[5, 3]].tolist()
    free = TRAIN.subset(slice(7))
    assert (len(free), len(free.b), free.paired) == (7, 40, False)
    assert 'unpaired' in repr(free) and 'no B' in repr(PairSet(TEST.x))
    assert len(TEST.new_empty()) == 0 == len(TEST.new_empty().b)
    assert sorted(TEST.unpaired(seed=1).b.flatten(1).sum(1).tolist()) == sorted(TEST.b.flatten(1).sum(1).tolist())
    assert not torch.equal(TEST.unpaired(seed=1).b, TEST.b) and torch.equal(TEST.unpaired(TRAIN).b, TRAIN.b)

@pytest.mark.parametrize('a, b, paired, words', [
    ((3, 1, 4, 4), (3, 3, 4, 4), False, ['A has 1 channel(s) and B has 3', 'expand']),
    ((3, 3, 4, 4), (3, 3, 4, 6), False, ['A is 4x4 and B is 4x6']),
    ((3, 3, 4, 4), (2, 3, 4, 4), True, ['3 pictures in A and 2 in B'])])
def test_sets_that_do_not_fit_are_refused(a, b, paired, words):
    with pytest.raises(ValueError) as e: PairSet(torch.zeros(a, dtype=torch.uint8), torch.zeros(b, dtype=torch.uint8), paired)
    for w in words: assert w in str(e.value)

def test_floats_and_small_sets_are_refused():
    with pytest.raises(TypeError, match='uint8'): PairSet(torch.rand(3, 3, 4, 4))
    with pytest.raises(ValueError, match='bs'): PairDL(numbered(3), 8, steps=2)
    assert len(PairDL(numbered(3), 8, steps=2, repeat=True).next_batch()[0]) == 8
    with pytest.raises(ValueError, match='augment'): PairDL(TEST, 4, augment=RandomFlip())
    with pytest.raises(ValueError, match='paired'): PairDL(TEST, 4, steps=1).load_state_dict(PairDL(TRAIN, 4, steps=1).state_dict())

def test_augmentation_comes_from_the_loaders_generator():
    one, two = (PairDL(TRAIN, 8, steps=2, seed=4, augment=RandomFlip()) for _ in range(2))
    plain = PairDL(TRAIN, 8, steps=2, seed=4)
    a, b, c = one.next_batch(), two.next_batch(), plain.next_batch()
    assert differences(list(a), list(b)) == []
    flipped = (a[0] != c[0]).flatten(1).any(1)
    assert torch.equal(a[0][flipped], c[0][flipped].flip(-1)) and 0 < flipped.sum() < 8

# -------------------------------------------------------------------------------------------- generated pictures
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([16, 32, 64]))
def test_shapes_are_whole_coloured_and_repeatable(seed, size):
    a, b = shapes(12, size, seed), shapes(12, size, seed)
    assert torch.equal(a.x, b.x) and torch.equal(a.b, b.b) and a.paired and a.x.shape == (12, 3, size, size)
    rim = torch.cat([a.b[..., 0, :], a.b[..., -1, :], a.b[..., 0], a.b[..., -1]], -1)
    assert rim.min() == 255                              # no shape is cut off
    assert (a.x[:, 0] == a.x[:, 2]).all()                # outlines have no colour
    assert hue_error(hue(unit(a.b)), a.factors['hue']).max() < 4
    inside = ink(unit(a.b)) > .9
    assert (inside.sum((1, 2)) > 4).all()

def test_thicker_outlines_have_more_ink():
    t = shapes(300, seed=1, thickness=(.8, 2.6))
    thin, thick = t.factors['thickness'] < 1.2, t.factors['thickness'] > 2.2
    drawn = ink(unit(t.x)).sum((1, 2))/ink(unit(t.b)).sum((1, 2)).sqrt()
    assert drawn[thin].max() < drawn[thick].min()

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, .999), min_size=1, max_size=60), st.floats(0, .999))
def test_hue_measures(hs, turn):
    h = torch.tensor(hs)
    assert 0 <= coverage(h) <= 1 + 1e-6
    e = hue_error(h, torch.full_like(h, turn))
    assert (e >= 0).all() and (e <= 180.001).all() and torch.allclose(e, hue_error(torch.full_like(h, turn), h), atol=1e-3)

def test_coloured_digits_keep_their_order_and_their_hue():
    p = colored_digits(DIGITS.test.subset(slice(30)), seed=4)
    assert p.x.shape == p.b.shape == (30, 3, 16, 16) and p.paired
    assert hue_error(hue(unit(p.b)), p.factors['hue']).max() < 4

# --------------------------------------------------------------------------------------------------- the equations
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=20), st.sampled_from(['lsq', 'log']))
def test_losses_are_least_when_the_judge_is_right(scores, gan):
    s = torch.tensor(scores)
    assert d_loss(s, s, gan) >= d_loss(s.clamp(min=1.) if gan == 'log' else torch.ones_like(s), s.clamp(max=0.) if gan == 'log'
                                       else torch.zeros_like(s), gan) - 1e-6
    assert g_loss(s, gan) >= 0 and d_loss(s, -s, gan) >= 0

@settings(max_examples=30, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 6), w=st.integers(2, 6), seed=st.integers(0, 99))
def test_conditional_instance_norm_is_its_formula(b, c, h, w, seed):
    x, s, t = (torch.randn(o, generator=seeded(seed), dtype=torch.double) for o in ((b, c, h, w), (b, c), (b, c)))
    m, v = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
    want = (x - m)/(v + 1e-5).sqrt()*s[..., None, None] + t[..., None, None]
    assert torch.allclose(cond_instance_norm(x, s, t), want, atol=1e-9)
    def f(*a): return cond_instance_norm(*a)
    args = [o.clone().requires_grad_() for o in (x, s, t)]
    assert torch.autograd.gradcheck(f, args, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_conditional_instance_norm_in_half(dtype):
    x, s, t = torch.randn(2, 3, 4, 4, dtype=dtype), torch.rand(2, 3, dtype=dtype), torch.rand(2, 3, dtype=dtype)
    got = cond_instance_norm(x, s, t)
    assert got.dtype == dtype and torch.allclose(got.float(), cond_instance_norm(x.float(), s.float(), t.float()), atol=5e-2)

def test_one_latent_vector_does_not_reach_the_other_pictures():
    G = CycleGenerator(3, 3, 2, .1)
    x, z = unit(TEST.x[:3]), torch.randn(3, 2).requires_grad_()
    g, = torch.autograd.grad(G(x, z)[1].square().sum(), z)
    assert (g[1] != 0).any() and (g[[0, 2]] == 0).all()

@pytest.mark.parametrize('form', FORMS)
def test_forward_of_each_form(form):
    n, (a, b) = net(form), (unit(TEST.x[:4]), unit(TEST.b[:4]))
    z = torch.randn(4, 2)
    za, zb = z if n.d_a else None, z if n.d_b else None
    out = n(a, b, za, zb)
    assert ('rec_za' in out, 'rec_zb' in out) == (form == 'paper', form in ('paper', 'code'))
    assert out['rec_a'].shape == a.shape and set(n(a, None, None, zb)) == {'fake_b', 'a'}
    pair = n(a, b, za, zb, True)
    assert not any(k.startswith('rec') for k in pair)
    assert set(n.judges) == {'a', 'b', *(['zb'] if n.E_B is not None else []), *(['za'] if n.E_A is not None else [])}
    for k in n.judges: assert made(k) in out
    if form == 'noise': assert torch.equal(out['enc_zb'], z)

def test_the_way_back_uses_what_was_read_and_not_what_was_drawn():
    n, (a, b) = net('code').eval(), (unit(TEST.x[:4]), unit(TEST.b[:4]))
    with torch.no_grad():
        one, two = (n(a, b, None, torch.randn(4, 2, generator=seeded(s))) for s in (0, 1))
        assert torch.equal(one['rec_b'], two['rec_b']) and not torch.equal(one['fake_b'], two['fake_b'])
        m = net('noise').eval()
        one, two = (m(a, b, None, torch.randn(4, 2, generator=seeded(s))) for s in (0, 1))
        assert not torch.equal(one['rec_b'], two['rec_b'])

def test_judge_gives_the_same_scores_and_no_gradient_to_the_judge():
    n, x = net('paper'), unit(TEST.b[:4]).requires_grad_()
    for D in (n.D_A, n.D_B):
        assert torch.allclose(judge(D, x), D(x), atol=1e-6)
        judge(D, x).sum().backward()
        assert all(p.grad is None for p in D.parameters()) and x.grad.abs().sum() > 0
    before = n.D_Zb[1].running_mean.clone()
    judge(n.D_Zb, torch.randn(4, 2))
    assert not torch.equal(before, n.D_Zb[1].running_mean)   # BatchNorm counts what it sees, as the code's does

# ------------------------------------------------------------------------------------------- one optimiser, three steps
OPTIMISERS = dict(torch=cyclegan_adam, fastai=partial(Adam, mom=.5, sqr_mom=.999, eps=1e-8, wd=0.), sgd=partial(SGD, mom=.9))

@pytest.mark.parametrize('opt', OPTIMISERS)
def test_a_part_step_moves_its_networks_and_nothing_else(opt):
    learn = learner(opt_func=OPTIMISERS[opt])
    quiet_fit(learn, 1, 1e-2)                             # momentum everywhere
    m = learn.model
    for p in m.parameters(): p.grad = torch.ones_like(p)
    step, before = PartStep(learn, [m.D_A], rate=.5), weights(m)
    lrs = [h['lr'] for h in learn.opt.hypers]
    step(m.D_A(unit(TEST.x[:4])).sum())
    moved = {k for k,v in weights(m).items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith('D_A') for k in moved)
    assert [h['lr'] for h in learn.opt.hypers] == lrs
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in m.parameters())

@pytest.mark.parametrize('opt', OPTIMISERS)
def test_zero_gradients_would_have_moved_the_others(opt):
    "What the released code does to $D_B$ in its supervised step, and what a step here does not."
    learn = learner(opt_func=OPTIMISERS[opt])
    quiet_fit(learn, 1, 1e-2)
    m, before = learn.model, weights(learn.model)
    for p in m.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert any(not torch.equal(v, before[k]) for k,v in weights(m).items())

def test_the_rate_of_the_discriminators_is_a_share_of_the_others_under_any_schedule():
    seen = []
    class Rates(PartStep):
        def step(self): seen.append((self.rate, self.learn.opt.hypers[0]['lr'])); super().step()
    import ssl_notes.augmented_cyclegan as lib
    was, lib.PartStep = lib.PartStep, Rates
    try: quiet_fit(learner(), 4, 1e-3, cbs=cyclegan_schedule(1e-3, 4))
    finally: lib.PartStep = was
    assert {r for r,_ in seen} == {.2}
    assert np.allclose([l for _,l in seen[::4]], [1e-3, 1e-3, 1e-3, 5e-4])
    lr, jump = 2e-4, [2e-4*decay_after(e, 50, 25) for e in range(50)]
    theirs = [4e-5 if e <= 25 else jump[e] for e in range(50)]      # the code writes the generators' rate into all groups
    assert math.isclose(theirs[26]/theirs[25], 4.8) and math.isclose(.2*jump[26], 3.84e-5)

@pytest.mark.parametrize('form', FORMS)
def test_each_side_moves_only_in_its_own_step(form):
    learn = learner(form, steps=1)
    m, log = learn.model, {}
    def changed(name, before): log[name] = {k.split('.')[0] for k,v in weights(m).items() if not torch.equal(v, before[k])
                                            and 'running' not in k and 'num_b' not in k}
    before = weights(m)
    learn.add_cb(Every('before_backward', lambda cb: changed('judges', before)))
    quiet_fit(learn, 1, 1e-3)
    assert all(k.startswith('D_') for k in log['judges']) and len(log['judges']) == len(m.judges)
    changed('all', before)
    assert log['all'] == {n for n,_ in m.named_children()}

def test_without_clipping_and_with_a_tight_one():
    norms = {}
    for clip in (math.inf, 1e-3):
        learn = learner(steps=1, clip=clip, opt_func=partial(SGD, mom=0.))
        before = weights(learn.model)
        quiet_fit(learn, 1, 1.)
        d = {}
        for k,v in weights(learn.model).items():
            if 'running' in k or 'num_b' in k: continue
            d[k.split('.')[0]] = d.get(k.split('.')[0], 0) + float((v - before[k]).square().sum())
        norms[clip] = {k: v**.5 for k,v in d.items()}
    assert all(v <= 1.01e-3*(.2 if k.startswith('D_') else 1) for k,v in norms[1e-3].items()), norms
    assert max(norms[math.inf].values()) > .01

def test_gradient_accumulation_does_not_let_the_discriminators_step_move_the_makers():
    learn = learner(cbs=GradientAccumulation(8), steps=4)        # two batches of four make a step
    m, before = learn.model, weights(learn.model)
    moved = []
    def look(cb): moved.append(any(not torch.equal(p, before[n]) for n,p in m.named_parameters() if n[:2] in ('G_', 'E_')))
    learn.add_cb(Every('after_batch', look))
    quiet_fit(learn, 1, 1e-3)
    assert moved[:2] == [False, True] and learn.augmented_cycle_gan.n_step == 2

def test_fp16_scales_and_skips_all_steps(monkeypatch):
    "On the CPU, with torch's scaler for it: a gradient that overflows moves nothing and lowers the scale."
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=10**6)
    def before_fit(self):
        self.autocast, self.learn.scaler = torch.autocast('cpu', torch.bfloat16), scaler
        self.scales = []
    monkeypatch.setattr(MixedPrecision, 'before_fit', before_fit)
    pairs = PairDL(TEST, 4, steps=1)
    learn = learner(cbs=MixedPrecision(), steps=1, pairs=pairs)
    quiet_fit(learn, 1, 1e-3)
    plain = learner(steps=1, pairs=PairDL(TEST, 4, steps=1))
    quiet_fit(plain, 1, 1e-3)
    for (n,a),(_,b) in zip(learn.model.named_parameters(), plain.model.named_parameters()):
        assert torch.allclose(a, b, atol=6e-3), n           # Adam's steps are of the size of the rate
    before, scale = weights(learn.model), scaler.get_scale()
    class Overflow(PartStep):
        def __call__(self, loss): super().__call__(loss*math.inf if self.rate < 1 else loss)
    import ssl_notes.augmented_cyclegan as lib
    monkeypatch.setattr(lib, 'PartStep', Overflow)
    learn.augmented_cycle_gan.pairs, learn.augmented_cycle_gan.semi = None, False
    learn.dls.train.steps = 1
    quiet_fit(learn, 1, 1e-3)
    assert scaler.get_scale() < scale
    judges = [k for k,v in weights(learn.model).items() if k.startswith('D_') and 'running' not in k and 'num_b' not in k]
    assert all(torch.equal(learn.model.state_dict()[k], before[k]) for k in judges)

def test_bf16_and_channels_last_run():
    learn = learner(steps=2)
    learn.model.to(memory_format=torch.channels_last)
    class BF16(MixedPrecision):
        def before_fit(self): self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False), []
    learn.add_cb(BF16())
    quiet_fit(learn, 1, 1e-3)
    assert np.isfinite([float(v) for v in learn.recorder.values[-1]]).all()

def test_torch_compile_sees_the_forward_as_one_graph():
    a, b = learner('code', steps=1), learner('code', steps=1)
    b.model = torch.compile(b.model, backend='eager', fullgraph=True)
    for l in (a, b): quiet_fit(l, 1, 1e-3)
    assert differences(weights(a.model), weights(unwrap(b.model))) == []

# ----------------------------------------------------------------------------------------------------- the callback
@pytest.mark.parametrize('kw', [dict(), dict(gan='log'), dict(gamma2=0), dict(lr_d=1.), dict(clip=math.inf)])
@pytest.mark.parametrize('form', FORMS)
def test_trains_in_every_form(form, kw):
    learn = quiet_fit(learner(form, steps=2, **kw), 2, 1e-3)
    n = len(learn.model.judges)
    names = [o for o in learn.recorder.metric_names if o not in ('epoch', 'time')]
    values = [float(v) for v in learn.recorder.values[-1]]
    assert np.isfinite(values).all() and len(names) == len(values)
    assert sum(o[:2] == 'g_' for o in names) == sum(o[:2] == 'd_' for o in names) == n == sum(o[:4] == 'cyc_' for o in names)
    assert 'mse_a' in names

@pytest.mark.parametrize('form', FORMS)
def test_true_pairs_as_further_steps_and_as_the_only_ones(form):
    semi = quiet_fit(learner(form, steps=2, pairs=PairDL(TEST, 4, steps=1)), 1, 1e-3)
    names = semi.recorder.metric_names
    assert 'sup_a' in names and 'cyc_a' in names
    sup = quiet_fit(learner(form, steps=2, train=TEST, paired=True), 1, 1e-3)
    names = sup.recorder.metric_names
    assert 'sup_b' in names and not any(o.startswith('cyc') for o in names) and 'd_a' not in names
    assert ('d_zb' in names) == (form in ('paper', 'code'))

def test_supervised_does_not_touch_the_discriminators_of_pictures():
    learn = learner('code', steps=3, train=TEST, paired=True)
    before = weights(learn.model)
    quiet_fit(learn, 1, 1e-3)
    after = weights(learn.model)
    assert all(torch.equal(after[k], before[k]) for k in before if k[:4] in ('D_A.', 'D_B.'))
    assert any(not torch.equal(after[k], before[k]) for k in before if k[:5] == 'D_Zb.')

def test_the_step_on_pairs_leaves_picture_discriminators_alone_though_they_have_momentum():
    learn = learner('code', steps=2, pairs=PairDL(TEST, 4, steps=1))
    kept = {}
    def keep(cb): kept.update({k: v.clone() for k,v in cb.learn.model.state_dict().items() if k[:4] in ('D_A.', 'D_B.')})
    learn.add_cb(Every('after_loss', keep))
    quiet_fit(learn, 1, 1e-3)
    after = weights(learn.model)
    assert all(torch.equal(after[k], v) for k,v in kept.items())

def test_the_same_seed_is_the_same_run_and_global_generators_do_not_matter():
    runs = []
    for s in (0, 1):
        learn = learner(steps=3)
        torch.manual_seed(s); np.random.seed(s)
        runs.append(weights(quiet_fit(learn, 1, 1e-3).model))
    assert differences(*runs) == []
    assert differences(runs[0], weights(quiet_fit(learner(steps=3, seed=1), 1, 1e-3).model))

def cut_at(n):
    def cut(cb):
        if cb.training and cb.train_iter == n: raise KeyboardInterrupt
    return Every('after_batch', cut)

@pytest.mark.parametrize('form, more, at', [('paper', {}, 1), ('paper', {}, 2), ('paper', {}, 3), ('code', dict(n=8), 1), ('code', dict(n=8), 3), ('noise', {}, 3),
                                            ('plain', dict(n=8), 1), ('paper', dict(opt='fastai'), 3)])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(form, more, at, tmp_path):
    def run(folder, stop=None):
        kw = dict(pairs=PairDL(TEST.subset(slice(more['n'])), 4, steps=1, seed=2)) if 'n' in more else {}
        learn = learner(form, [Checkpoint(folder, every=1), EMATeacher(.9)], 2, opt_func=OPTIMISERS[more.get('opt', 'torch')], **kw)
        try: quiet_fit(learn, 2, 1e-3, cbs=stop or [])
        except KeyboardInterrupt: pass
        return learn
    run(tmp_path/'cut', cut_at(at))
    cut, whole = run(tmp_path/'cut'), run(tmp_path/'whole')
    for f in (lambda l: weights(l.model), lambda l: weights(l.ema_teacher.teacher), lambda l: l.opt.state_dict(), lambda l: l.dls.train.state_dict(),
              lambda l: l.augmented_cycle_gan.state_dict(), lambda l: [list(v)[:-1] for v in l.recorder.values]):
        assert differences(f(cut), f(whole)) == []

@pytest.mark.parametrize('opt', ['torch', 'fastai'])
@pytest.mark.parametrize('event', ['before_step', 'after_step', 'judges'])
def test_a_fit_that_was_broken_off_goes_on_in_the_same_learner(event, opt, tmp_path, monkeypatch):
    "The gradient that was pending belongs to the fit that is gone."
    def new(folder): return learner(cbs=[Checkpoint(folder, every=1)], steps=2, opt_func=OPTIMISERS[opt], pairs=PairDL(TEST, 4, steps=1, seed=2))
    whole, cut, calls = new(tmp_path/'whole'), new(tmp_path/'cut'), []
    quiet_fit(whole, 2, 1e-3)
    def stop(*_):
        calls.append(1)
        if len(calls) == (3 if event == 'judges' else 2): raise KeyboardInterrupt   # after the first checkpoint
    step = PartStep.step
    def broken(self):
        if self.rate < 1: stop()
        step(self)
    if event == 'judges': monkeypatch.setattr(PartStep, 'step', broken)
    with pytest.raises(KeyboardInterrupt): quiet_fit(cut, 2, 1e-3, cbs=[] if event == 'judges' else Every(event, stop))
    quiet_fit(cut, 2, 1e-3)
    assert differences(weights(cut.model), weights(whole.model)) == []
    assert [list(v)[:-1] for v in cut.recorder.values] == [list(v)[:-1] for v in whole.recorder.values]

@pytest.mark.parametrize('opt', ['torch', 'fastai'])
def test_gradients_that_lie_on_discriminators_move_nothing(opt):
    learn = learner(opt_func=OPTIMISERS[opt])
    sum(D(unit(TEST.x[:4]) if k in 'ab' else torch.randn(4, 2)).sum() for k,D in learn.model.judges.items()).backward()
    before, moved = {}, []
    judges = lambda: {n: p.clone() for n,p in learn.model.named_parameters() if n[:2] == 'D_'}
    learn.add_cbs([Every('after_loss', lambda cb: before.update(judges())),
                   Every('after_step', lambda cb: moved.append(differences(before, judges())))])
    quiet_fit(learn, 1, 1e-3)
    assert moved == [[]]*4

def test_columns_of_true_pairs_are_means_over_the_steps_on_them():
    shown = []
    for n in (4, 8, 16):   # one, two and four batches of four between two updates
        learn = learner(cbs=GradientAccumulation(n), pairs=PairDL(TEST, 4, steps=1, seed=1))
        quiet_fit(learn, 1, 0.)
        shown.append(learn.augmented_cycle_gan.columns()['sup_a'])
    assert max(shown)/min(shown) < 1.2

def test_a_finished_run_does_not_show_in_the_columns_of_the_next(tmp_path):
    quiet_fit(learner(cbs=Checkpoint(tmp_path, every=1), steps=2), 1, 1e-3)
    learn = learner(cbs=Checkpoint(tmp_path, every=1), steps=2)
    quiet_fit(learn, 1, 1e-3)
    learn.remove_cb(learn.checkpoint)
    quiet_fit(learn, 1, 1e-3)
    assert learn.augmented_cycle_gan.sums['_n'] == 2

def test_a_copy_without_its_pairs_does_not_train_without_them():
    learn = learner(pairs=PairDL(TEST, 4, steps=1))
    twin = deepcopy(learn)
    refused(twin, 'pairs: a copy')
    twin.augmented_cycle_gan.pairs = PairDL(TEST, 4, steps=1)
    for l in (learn, twin): quiet_fit(l, 1, 1e-3)
    assert differences(weights(learn.model), weights(twin.model)) == []

def test_a_checkpoint_with_pairs_is_not_read_by_a_run_without(tmp_path):
    learn = learner(cbs=Checkpoint(tmp_path, every=1), steps=2, pairs=PairDL(TEST, 4, steps=1))
    try: quiet_fit(learn, 1, 1e-3, cbs=cut_at(1))
    except KeyboardInterrupt: pass
    with pytest.raises(ValueError, match='pairs'): quiet_fit(learner(cbs=Checkpoint(tmp_path, every=1), steps=2), 1, 1e-3)

def test_lr_find_leaves_no_trace():
    one, two = (learner(steps=3, pairs=PairDL(TEST, 4, steps=1, seed=1)) for _ in range(2))
    with one.no_bar(): one.lr_find(num_it=5, show_plot=False)
    one.dls.train.load_state_dict(two.dls.train.state_dict())
    assert differences(one.augmented_cycle_gan.state_dict(), two.augmented_cycle_gan.state_dict()) == []
    for l in (one, two): quiet_fit(l, 1, 1e-3)
    assert differences(weights(one.model), weights(two.model)) == []

def test_validation_and_predictions_do_not_move_training(tmp_path):
    one, two = learner(steps=3), learner(steps=3)
    for l in (one, two): quiet_fit(l, 1, 1e-3)
    with one.no_bar():
        first, again = one.validate(), one.validate()
        preds = one.get_preds()
        one.predict(TEST.x[0])
    assert first == again and preds[0].shape == TEST.b.shape and np.isclose(first[0], two.validate()[0])
    for l in (one, two): quiet_fit(l, 1, 1e-3)
    assert differences(weights(one.model), weights(two.model)) == []

def test_predictions_and_export(tmp_path):
    learn = quiet_fit(learner(steps=2), 1, 1e-3)
    learn.path = tmp_path
    with learn.no_bar():
        picture, tensor, raw = learn.predict(TEST.x[0])
        want, _ = learn.get_preds(dl=learn.dls.test_dl([TEST.x[0], TEST.x[1]]))
        assert picture.shape == (3, 16, 16) and want.shape == (2, 3, 16, 16) and 0 <= picture.min() and picture.max() <= 1
        assert torch.equal(torch.Tensor(tensor), torch.Tensor(raw))
        learn.export('m.pkl')
    again = load_learner(tmp_path/'m.pkl')
    with again.no_bar(): assert torch.allclose(torch.Tensor(again.predict(TEST.x[0])[1]), torch.Tensor(tensor))
    Image.fromarray(TEST.x[0].permute(1, 2, 0).numpy()).resize((40, 30)).save(tmp_path/'x.png')
    with again.no_bar(): assert again.predict(tmp_path/'x.png')[0].shape == (3, 16, 16)

def test_shows_batches_and_results():
    import matplotlib.pyplot as plt
    learn = quiet_fit(learner(steps=2), 1, 1e-3)
    learn.dls.show_batch(max_n=3)
    with learn.no_bar(): learn.show_results(max_n=3)
    plt.close('all')

def test_the_averaged_networks_are_evaluated():
    learn = learner(cbs=EMATeacher(.5), steps=3)
    quiet_fit(learn, 1, 1e-2)
    with learn.no_bar(): ema = learn.validate()[0]
    learn.ema_teacher.evaluate = False
    with learn.no_bar(): assert learn.validate()[0] != ema

def test_any_loader_of_two_pictures(tmp_path):
    for k,x in dict(A=TEST.x, B=TEST.b).items():
        (tmp_path/k).mkdir()
        for i in range(12): Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path/k/f'{i}.png')
    files = sorted((tmp_path/'A').iterdir())
    block = DataBlock((ImageBlock, ImageBlock), get_y=lambda f: tmp_path/'B'/f.name, splitter=lambda fs: (list(range(8)), list(range(8, 12))),
                      batch_tfms=Normalize.from_stats([.5]*3, [.5]*3, cuda=False))
    dls = block.dataloaders(files, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, net(), CycleLoss(), cyclegan_adam, metrics=mse_a, cbs=AugmentedCycleGANCallback())
    quiet_fit(learn, 1, 1e-3)
    assert np.isfinite([float(v) for v in learn.recorder.values[-1]]).all()

# ------------------------------------------------------------------------------------------------------ bad input
def refused(learn, *words, error=ValueError, n=1):
    w = weights(learn.model)
    with pytest.raises(error) as e: quiet_fit(learn, n, 1e-3)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    after = weights(learn.model)
    assert differences({k: v for k,v in w.items() if 'running' not in k and 'num_b' not in k},
                       {k: v for k,v in after.items() if 'running' not in k and 'num_b' not in k}) == []

def plain_dls(a, b, bs=4):
    return DataLoaders(TfmdDL(list(zip(a, b)), bs=bs, num_workers=0), TfmdDL(list(zip(a, b)), bs=bs, num_workers=0))

def own(a, b, bs=4, model=None, **kw):
    return cyclegan_learner(plain_dls(a, b, bs), AugmentedCycleGANCallback(**kw), model or net(), metrics=[])

A, B = unit(TEST.x[:8]), unit(TEST.b[:8])
@pytest.mark.parametrize('a, b, words', [
    (A[:, :1], B, ['dls.train', 'channels and size']), (A, B[..., :8], ['channels and size']),
    (2*A, B, ['pictures of A leave [-1,1]', 'Normalize']), (A, B*math.nan, ['pictures of B leave [-1,1]']),
    (A, TEST.b[:8].float(), ['pictures of B leave [-1,1]'])])
def test_pictures_that_do_not_fit(a, b, words): refused(own(a, b), *words)

def test_pictures_in_0_1_are_mentioned():
    with pytest.warns(UserWarning, match=r'of A in the first batch is darker than 0'): quiet_fit(own((A + 1)/2, B), 1, 1e-3)

def test_a_batch_of_one_has_no_batch_statistics(): refused(own(A[:1], B[:1]), 'a batch of one', 'drop_last')

def test_no_pictures_of_b():
    dls = DataLoaders(PairDL(PairSet(TEST.x), 4, steps=1), PairDL(TEST, 4))
    refused(cyclegan_learner(dls, net=net(), metrics=[]), 'there are no pictures of B')

@pytest.mark.parametrize('kw, words', [
    (dict(gan='wgan'), "gan: got 'wgan'"), (dict(gamma1=-1), 'gamma1: got -1'), (dict(gamma2=math.nan), 'gamma2: got nan'), (dict(lr_d=0), 'lr_d: got 0'),
    (dict(clip=0), 'clip: got 0'), (dict(lam='a'), "lam: got 'a'"),
    (dict(gamma1=math.inf), 'gamma1: got inf'), (dict(lr_d=math.inf), 'lr_d: got inf'), (dict(pairs=PairDL(TEST, 4, steps=1), paired=True), 'pairs, paired')])
def test_settings_that_make_no_sense(kw, words):
    with pytest.raises(ValueError) as e: AugmentedCycleGANCallback(**kw)
    assert words in str(e.value)

@pytest.mark.parametrize('pairs', [TEST, PairDL(TEST, 4), PairDL(TRAIN, 4, steps=1), [1, 2]], ids=['set', 'one pass', 'unpaired', 'list'])
def test_pairs_must_be_a_stream_of_true_pairs(pairs):
    with pytest.raises(TypeError, match='pairs: got'): AugmentedCycleGANCallback(pairs=pairs)

def test_what_would_train_something_else_is_refused(monkeypatch):
    dls = pair_dls(TRAIN, TEST, 4, 2, device='cpu')
    refused(cyclegan_learner(dls, net=net(), cbs=AugmentedCycleGANCallback(gan='log')), 'two AugmentedCycleGANCallbacks')
    refused(learner(paired=True), 'paired: got True')
    refused(learner(opt_func=ranger), 'Lookahead', error=TypeError)
    refused(learner(pairs=PairDL(TEST, 1, steps=1)), 'pairs: bs is 1')
    refused(learner(pairs=PairDL(shapes(8, 32), 4, steps=1)), 'pairs: pictures are (3, 32, 32)')
    refused(cyclegan_learner(pair_dls(shapes(16, 32), None, 4, 2, device='cpu'), net=net()), "a, b: got 32x32, expected the encoder's size, 16")
    with pytest.raises(ValueError, match='net, net_args'): cyclegan_learner(dls, net=net(), net_args=dict(d=7))
    with pytest.raises(TypeError, match="paired: got 'no'"): AugmentedCycleGANCallback(paired='no')
    with pytest.raises(TypeError, match='a: expected pictures'): SamplePictures(TEST.x)
    with pytest.raises(ValueError, match='net: has no encoder'): latent_error(net('plain'), A)
    def before_fit(self): self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu'), []
    monkeypatch.setattr(MixedPrecision, 'before_fit', before_fit)
    refused(learner(cbs=[MixedPrecision(), GradientAccumulation(8)]), 'GradientAccumulation: discriminators step')

def test_sets_that_lack_something():
    for data in (PairSet(TEST.x), ImageSet(TEST.x)):
        with pytest.raises(TypeError, match='train: got'): pair_dls(data)
    with pytest.raises(ValueError, match='paired, but there are no pictures of B'): PairSet(TEST.x, paired=True)
    with pytest.raises(ValueError, match='factors: hue has 3 values for 12'): PairSet(TEST.x, TEST.b, True, dict(hue=torch.zeros(3)))
    with pytest.raises(ValueError, match='steps'): pair_dls(TRAIN, steps=0)
    with pytest.raises(ValueError, match='expected squares'): cyclegan_learner(plain_dls(A[..., :8], B[..., :8]))

def test_a_schedule_for_other_epochs():
    with pytest.raises(ValueError, match='total: the schedule is made for 50 epochs, the fit has 2'): quiet_fit(learner(), 2, 1e-3, cbs=cyclegan_schedule())

def test_plain_networks_need_no_batch_and_frozen_ones_rest():
    quiet_fit(learner('plain', bs=1, steps=2), 1, 1e-3)
    learn = learner()
    for D in learn.model.judges.values(): D.requires_grad_(False)
    before = weights(learn.model)
    quiet_fit(learn, 1, 1e-3)
    assert not [k for k in differences(before, weights(learn.model)) if k[:2] == 'D_' and 'running' not in k and 'num_b' not in k]

def test_losses_of_single_pictures():
    learn = learner()
    *_, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (len(TEST),) and abs(losses.mean() - learn.validate()[0]) < 1e-5

def test_networks_and_losses_of_another_kind():
    dls = pair_dls(TRAIN, TEST, 4, 1, device='cpu')
    refused(Learner(dls, nn.Conv2d(3, 3, 1), CycleLoss(), cbs=AugmentedCycleGANCallback()), 'model: got a Conv2d', error=TypeError)
    refused(Learner(dls, net(), nn.MSELoss(), cbs=AugmentedCycleGANCallback()), 'loss_func: got')
    assert isinstance(Learner(dls, net()).loss_func, CycleLoss)

@pytest.mark.parametrize('kw, words', [
    (dict(d=0), 'd: got 0'), (dict(d=-1), 'd: got -1'), (dict(d=1.5), 'd: got 1.5'), (dict(form='two'), "form: got 'two'"), (dict(size=20), 'size=20'),
    (dict(size=8), 'size=8'), (dict(width=-1.), 'width=-1'), (dict(width=0), 'width=0')])
def test_networks_that_cannot_be_made(kw, words):
    with pytest.raises(ValueError) as e: augmented_cyclegan(**{**dict(size=16), **kw})
    assert words in str(e.value)

def test_plain_needs_no_latent_vectors(): assert augmented_cyclegan(16, 0, 'plain', .07).d_b == 0

def test_parts_that_do_not_belong_together():
    one, E = nn.Identity(), PairEncoder(6, 2, .1, 16)
    with pytest.raises(ValueError, match='an encoder needs a discriminator'): AugmentedCycleGAN(one, one, one, one, E_A=E, d_a=2)
    with pytest.raises(ValueError, match='an encoder needs a discriminator'): AugmentedCycleGAN(one, one, one, one, D_Zb=one, d_b=2)
    with pytest.raises(ValueError, match='d_a: got 0'): AugmentedCycleGAN(one, one, one, one, E_A=E, D_Za=one)
    with pytest.raises(ValueError, match='d_b: got -2'): AugmentedCycleGAN(one, one, one, one, d_b=-2)

def test_a_loss_that_is_not_finite_is_named():
    learn = learner(steps=2)
    with torch.no_grad(): learn.model.D_B[0].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match='d_b is not finite'): quiet_fit(learn, 1, 1e-3)

# --------------------------------------------------------------------------------------------------------- measures
def test_measures_on_networks_that_do_it_right_and_wrong():
    "G_AB fills the outline with the colour that z says; E_B reads it off; G_BA knows all outlines by heart."
    data = shapes(64, seed=8)
    a, b = unit(data.x), unit(data.b)
    fill = ink(b)
    angle = lambda z: torch.atan2(z[:, 1], z[:, 0])/(2*math.pi) % 1
    def rgb(h): return (2 - ((6*h[:, None] - torch.tensor([0, 2, 4]) + 3) % 6 - 3).abs()).clamp(0, 1)
    def which(x): return torch.cdist(x.flatten(1), a.flatten(1)).argmin(1)
    class G(nn.Module):
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x, z): return 1 - 2*fill[which(x)][:, None]*(1 - rgb(angle(z))[..., None, None])
    class H(nn.Module):
        def forward(self, x, z=None): return a[torch.cdist(ink(x).flatten(1), fill.flatten(1)).argmin(1)]
    class E(nn.Module):
        def forward(self, x, y):
            h = hue(y)*2*math.pi
            return torch.stack([h.cos(), h.sin()], 1), None
    good = AugmentedCycleGAN(G(), H(), nn.Identity(), nn.Identity(), E_B=E(), D_Zb=nn.Identity(), d_b=2)
    i = torch.randperm(64, generator=seeded())
    assert hue_error(hue(transfer(good, a, b, i)), hue(b)[i]).mean() < 5
    z = torch.randn(300, 2, generator=seeded(1))
    assert coverage(hue(translations(good, a[:1], z)[0])) > .95
    blind = AugmentedCycleGAN(G(), H(), nn.Identity(), nn.Identity(), E_B=SimpleE(), D_Zb=nn.Identity(), d_b=2)
    assert abs(latent_error(blind, a) - math.sqrt(2/math.pi)) < .12
    assert noise_sensitivity(good, b, (0,))[0] < .05

class SimpleE(nn.Module):
    def forward(self, x, y): return torch.zeros(len(x), 2), None

def test_noise_destroys_what_is_hidden_and_spares_what_is_not():
    "A generator that hides the colour in the last bits of the outline, as CycleGANs do."
    data = shapes(64, seed=8)
    b = unit(data.b)
    class Hide(nn.Module):
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x, z=None): return (ink(x)[:, None] - .5)*1.9 + x/200
    class Seek(nn.Module):
        def forward(self, x, z=None):
            shape = x.mean(1, keepdim=True)
            return ((x - shape)*200).clamp(-1, 1)*(shape > 0) + (shape <= 0)
    hidden = AugmentedCycleGAN(Seek(), Hide(), nn.Identity(), nn.Identity())
    levels = noise_sensitivity(hidden, b, (0, .5, 5))
    assert levels[0] < levels[1] < levels[2] and levels[2] > 2*levels[0]

def test_evaluating_puts_modes_back():
    n = net().train(); n.E_B.eval()
    with evaluating(n): assert not any(m.training for m in n.modules()) and not torch.is_grad_enabled()
    assert n.training and n.G_AB.training and not n.E_B.body.training and torch.is_grad_enabled()

def test_results_do_not_depend_on_the_rest_of_the_batch_in_evaluation_and_do_in_training():
    n, (a, b) = net('code'), (unit(TEST.x), unit(TEST.b))
    with evaluating(n): assert torch.allclose(n.E_B(a, b)[0][:4], n.E_B(a[:4], b[:4])[0], atol=1e-5)
    n.train()
    with torch.no_grad(): assert not torch.allclose(n.E_B(a, b)[0][:4], n.E_B(a[:4], b[:4])[0], atol=1e-3)

@pytest.mark.parametrize('form', FORMS)
def test_sheets(form):
    n = net(form)
    x = sheet(n, A[:3], n=4)
    assert x.shape == (3, 48, (5 if n.d_b else 2)*16) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, sheet(n, A[:3], n=4)) and n.training

def test_sample_pictures_every_few_epochs_and_at_the_end(tmp_path):
    one, two = learner(cbs=SamplePictures(A[:2], 3, every=2, folder=tmp_path), steps=2), learner(steps=2)
    quiet_fit(one, 5, 1e-3)
    with one.no_bar(): one.validate()
    assert [f.name for f in sorted(tmp_path.iterdir())] == [f'epoch_{k:04}.png' for k in (1, 3, 4)]
    assert Image.open(tmp_path/'epoch_0001.png').size == (4*16*3, 2*16*3)
    quiet_fit(two, 5, 1e-3)
    assert differences(weights(one.model), weights(two.model)) == []      # looking changes nothing
    with pytest.raises(ValueError, match='every: got 0'): SamplePictures(A, every=0)

def test_grey_pictures_too(tmp_path):
    g = lambda x: x[:, :1].contiguous()
    data = PairSet(g(TRAIN.x), g(TRAIN.b))
    dls = pair_dls(data, bs=4, steps=2, device='cpu')
    learn = cyclegan_learner(dls, cbs=SamplePictures(unit(data.x[:2]), folder=tmp_path), net_args=dict(d=2, width=.07))
    quiet_fit(learn, 1, 1e-3)
    assert learn.model.G_AB.in_channels == 1 and len(list(tmp_path.iterdir())) == 1

def test_folders(tmp_path):
    for k,n in dict(A=3, B=5).items():
        (tmp_path/k/'deeper').mkdir(parents=True)
        for i in range(n): Image.new('L', (20 + i, 30), 40*i).save(tmp_path/k/('deeper' if i else '')/f'{i}.png')
    p = pair_folders(tmp_path/'A', str(tmp_path/'B'), 16)
    assert (len(p), len(p.b), p.paired, p.x.shape[1:]) == (3, 5, False, (3, 16, 16)) and p.name == 'A and B'
    with pytest.raises(ValueError, match='2 pictures have no partner'): pair_folders(tmp_path/'A', tmp_path/'B', 16, True)
    with pytest.raises(ValueError, match='a: there are no pictures'): pair_folders(tmp_path/'C', tmp_path/'B')
    with pytest.raises(ValueError, match='a, b: .* one folder'): pair_folders(tmp_path/'A', tmp_path/'A'/'deeper')
    with pytest.raises(ValueError, match='a, b: .* one folder'): pair_folders(tmp_path, tmp_path/'B')
    Image.fromarray(np.full((9, 9), 5000, np.uint16)).save(tmp_path/'A'/'deep.png')
    with pytest.raises(ValueError, match='more than 8 bits'): pair_folders(tmp_path/'A', tmp_path/'B', 16)
    (tmp_path/'A'/'deep.png').unlink()
    (tmp_path/'A'/'1.jpg').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='1.jpg cannot be read'): pair_folders(tmp_path/'A', tmp_path/'B', 16)

# ------------------------------------------------------------------------------------------------------ processes
@gloo
@linux
def test_two_processes_agree_and_draw_different_latent_vectors(tmp_path):
    def run(rank):
        from torch.nn.parallel import DistributedDataParallel as DDP
        import os
        os.environ.update(RANK=str(rank), WORLD_SIZE='2')
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        drawn = []
        learn = learner('paper', steps=3, pairs=PairDL(TEST, 4, steps=1, seed=rank), model=net('paper', seed=0))
        with torch.no_grad(): learn.model.D_B[0].weight.add_(.01*rank)      # DDP will not mend this: the callback does
        learn.dls = pair_dls(TRAIN, TEST, 4, 3, seed=rank, device='cpu')
        learn.model = DDP(learn.model)
        learn.add_cb(Every('after_pred', lambda cb: drawn.append(cb.learn.augmented_cycle_gan.drawn['zb'].clone()) if cb.training else None))
        quiet_fit(learn, 1, 1e-3)
        params = {n: p.detach().clone() for n,p in unwrap(learn.model).named_parameters()}
        return dict(params=params, drawn=torch.stack(drawn), generator=learn.augmented_cycle_gan.generator.get_state())
    a, b = two_processes(run, tmp_path)
    assert differences(a['params'], b['params']) == []
    assert not torch.equal(a['drawn'], b['drawn']) and torch.equal(a['generator'], b['generator'])
