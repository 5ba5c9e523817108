"Between-class learning for sounds: loudness, crops and stretches against loops, files, folds, ten crops, exact resume, bad input."
import math, os, pickle, random, sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import fastai.callback.schedule # lr_find
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.io import wavfile
from torch import nn
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD

from ssl_notes.bc_learning import BCLearningCallback, mix_waves
from ssl_notes.bc_sound import (BCSoundCallback, SoundDL, SoundSet, TenCrop, ValidEvery, a_weighting, envnet_learner, esc10, fold_split, gain,
                                mean_log_softmax, mix_sounds, random_gain, read_sound, sound_dls, sound_folder, sound_ratio, stretch, ten_crops, trim, windows)
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint
from ssl_notes.data import Splits

from helpers import DIGITS, differences, Every, quiet_fit, seeded, weights

quick = settings(max_examples=40, deadline=None)
nan, inf = float('nan'), float('inf')
t64 = partial(torch.tensor, dtype=torch.float64)

def tone(amplitude, hz, rate, T): return (amplitude*torch.sin(2*math.pi*hz*torch.arange(T, dtype=torch.float64)/rate))

def clips(n=24, c=3, rate=16_000, lo=60, hi=200, seed=0):
    "Noise of different lengths, three classes, four folds."
    rng = np.random.RandomState(seed)
    x = [rng.randint(-20000, 20000, rng.randint(lo, hi)).astype(np.int16) for _ in range(n)]
    return SoundSet(x, np.arange(n) % c, rate, fold=np.arange(n)//c % 4 + 1, name='noise')

def small_dls(T=50, bs=6, data=None, **kw): return sound_dls(fold_split(data or clips(), 1), bs=bs, T=T, device='cpu', **kw)
def net(T=50, c=3): return nn.Sequential(nn.Flatten(), nn.Linear(T, 8), nn.ReLU(), nn.Linear(8, c))
def learner(cbs=(), dls=None, T=50, model=None, **kw):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    dls = small_dls(T) if dls is None else dls() if callable(dls) else dls
    return Learner(dls, (model or partial(net, T))(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD, cbs=[*cbs, TenCrop()], **kw)
def refused(cbs, *words, dls=None, error=ValueError):
    learn = learner(cbs, dls)
    was = weights(learn)
    with pytest.raises(error) as e: quiet_fit(learn, 1, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    assert differences(was, weights(learn)) == []


# -- loudness -------------------------------------------------------------------------------------
def test_a_weighting_by_hand():
    a = a_weighting(16_000)
    for i,v in {0: -80, 1: -78.326254, 8: -26.356673, 16: -16.189653, 32: -8.674827, 64: -3.247808, 128: .000142, 256: 1.201674, 512: .963598, 1024: -1.146879}.items():
        assert math.isclose(a[i], v, abs_tol=1e-6)
    assert a.shape == (1025,) and a.argmax() == 322 and math.isclose(a.max(), 1.270985, abs_tol=1e-6)
    b = a_weighting(44_100)
    for i,v in {1: -68.134464, 93: .004086, 200: 1.239433, 1000: -3.027205, 2048: -10.613178}.items(): assert math.isclose(b[i], v, abs_tol=1e-6)
    a.mul_(0)   # what a reader does to it stays with the reader
    assert math.isclose(a_weighting(16_000)[256], 1.201674, abs_tol=1e-6)

@pytest.mark.parametrize('rate, T, ga, gb, p', [(16_000, 24_014, 49.925799, 31.851193, .05077635), (44_100, 66_650, 55.946351, 37.871778, .05077653)])
def test_gain_by_hand(rate, T, ga, gb, p):
    a, b = tone(.5, 1000, rate, T), tone(.1, 440, rate, T)
    for dtype,tol in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        g = gain(torch.stack([a, b, 0*a]).to(dtype), rate)
        np.testing.assert_allclose(g, [ga, gb, -80], atol=tol)
    assert math.isclose(sound_ratio(t64(ga), t64(gb), t64(.3)), p, abs_tol=1e-8)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([16_000, 44_100]), st.integers(1, 9000))
def test_gain_against_a_loop(seed, rate, T):
    "A batch is its clips one by one; windows in a plain loop with numpy; a short clip is filled with zeros; ten times as loud is 20 dB"
    x = .1*torch.rand(2, T, generator=seeded(seed), dtype=torch.float64)
    got = gain(x, rate)
    n = 2048 if rate == 16_000 else 4096
    w = .5 - .5*np.cos(2*np.pi*np.arange(n)/n)
    a = 10**(a_weighting(rate).numpy()/10)
    for row,g in zip(x, got):
        y = np.pad(row.numpy(), (0, max(0, n - T)))
        level = [10*np.log10(max(1e-8, (abs(np.fft.rfft(w*y[i:i+n]))**2*a).sum())) for i in range(0, len(y) - n + 1, n//2)]
        assert math.isclose(g, max(level), abs_tol=1e-6) and torch.equal(gain(row, rate), g)
    if (got > -70).all(): np.testing.assert_allclose(gain(10*x, rate), got + 20, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gain_of_half_precision(dtype):
    a = tone(.5, 1000, 16_000, 5000)
    np.testing.assert_allclose(gain(a.to(dtype), 16_000).float(), gain(a, 16_000), atol=.1)
    x = torch.stack([a, tone(.1, 440, 16_000, 5000)]).to(dtype)
    assert mix_sounds(x, x.flip(0), torch.tensor([.3, .6]), 16_000).isfinite().all()

@pytest.mark.parametrize('g1, g2, r, p', [(0, 0, .5, .5), (-30, -30, .3, .3), (20, 0, .5, .09090909), (0, 20, .5, .90909091), (6, 0, .5, .33386058), (0, 6, .25, .39943094),
                                          (-20, -40, .7, .18918919), (-80, -10, .5, .99968387), (0, 0, .9, .9), (-10, -30, .4, .0625)])
def test_share_by_hand(g1, g2, r, p):
    assert math.isclose(sound_ratio(t64(g1), t64(g2), r), p, abs_tol=1e-8)
    assert math.isclose(sound_ratio(t64(g2), t64(g1), 1 - r), 1 - p, abs_tol=1e-8)

@quick
@given(st.floats(-80, 100), st.floats(-80, 100), st.floats(0, 1))
def test_share_stays_a_share(g1, g2, r):
    for dtype in (torch.float32, torch.float64):
        p = sound_ratio(*(torch.tensor([o], dtype=dtype) for o in (g1, g2, r)))
        assert 0 <= p <= 1 and (r or p == 0) and (r < 1 or p == 1)

def test_share_refuses_and_does_not_wait():
    for r in (-.1, 1.1, nan):
        with pytest.raises(ValueError, match='r: '): sound_ratio(t64([0.]), t64([0.]), t64([r]))
    m = torch.empty(4, device='meta')
    assert sound_ratio(m, m, m).shape == (4,)   # nothing is asked that a device must answer

def test_mixture_by_hand():
    x1, x2 = torch.tensor([[1., 0, -1, .5]]), torch.tensor([[.1, .2, -.1, 0]])
    p = sound_ratio(torch.tensor([-10.]), torch.tensor([-30.]), torch.tensor([.4]))
    np.testing.assert_allclose(mix_waves(x1, x2, p), [[.16629753, .19955703, -.16629753, .03325951]], atol=1e-7)

def test_mixture_is_heard_in_its_ratio():
    "The levels of both parts differ by the ratio, whatever they were; silence takes nothing away"
    a, b = tone(.5, 1000, 16_000, 6000)[None], tone(.01, 440, 16_000, 6000)[None]
    for r in (.2, .5, .9):
        p = sound_ratio(gain(a, 16_000), gain(b, 16_000), t64([r]))
        got = gain(p*a, 16_000) - gain((1-p)*b, 16_000)
        assert math.isclose(10**(got/20), r/(1-r), rel_tol=1e-6)
    z = torch.zeros(1, 6000)
    for r in (0., .4, 1.): assert not mix_sounds(z, z, torch.tensor([r]), 16_000).any()
    assert mix_sounds(z, a.float(), torch.tensor([.5]), 16_000).isfinite().all()

def test_unknown_rate():
    for f in (lambda: gain(torch.zeros(9), 8000), lambda: a_weighting(48_000), lambda: BCSoundCallback(rate=8000)):
        with pytest.raises(ValueError, match='rate: got .* 16000, 44100 Hz'): f()


# -- stretch and crops ----------------------------------------------------------------------------
def test_stretch_by_hand():
    assert stretch(torch.tensor([0., 10, 20, 30, 40]), 1.25).tolist() == [0, 8, 16, 24, 32, 40]
    assert stretch(torch.tensor([0., 10, 20, 30]), .8).tolist() == [0, 12.5, 25]
    np.testing.assert_allclose(stretch(torch.tensor([1., -1, 1, -1, 1]), 1.25), [1, -.6, .2, .2, -.6, 1], atol=1e-6)

@quick
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(.8, 1.25))
def test_stretch_against_numpy(seed, n, s):
    x = torch.randn(n, generator=seeded(seed))
    y = stretch(x, s)
    assert len(y) == int(n*s)
    np.testing.assert_allclose(y, np.interp(np.arange(len(y))/s, np.arange(n), x.numpy()), atol=1e-5)

def test_ten_crops_by_hand():
    for length,T,step,last in ((220_500, 66_650, 24_500, 220_500), (80_000, 24_014, 8888, 79_992)):
        assert ten_crops(length, T).tolist() == list(range(0, last + 1, step))
    assert ten_crops(torch.tensor([220_500, 80_000]), 24_014).shape == (2, 10)

@quick
@given(st.integers(1, 500), st.integers(2, 99), st.integers(1, 12))
def test_crops_stay_inside(length, T, n):
    s = ten_crops(length, T, n)
    assert len(s) == n and s[0] == 0 and s[-1] + T <= length + 2*(T//2) + T % 2*(length == 0)
    assert len(set(s.diff().tolist())) <= 1

@quick
@given(st.integers(0, 10**6), st.integers(2, 30), st.booleans())
def test_windows_against_a_loop(seed, T, stretched):
    "Stretch, pad and cut one clip after the other; clips of one sample, and those shorter than a crop"
    g = seeded(seed)
    length = torch.randint(1, 40, (4,), generator=g)
    x = torch.zeros(4, 40, dtype=torch.int16)
    for row,n in zip(x, length): row[:n] = torch.randint(-32768, 32768, (int(n),), generator=g).short()
    s = 1.25**(2*torch.rand(4, generator=g, dtype=torch.float64) - 1) if stretched else None
    long = length if s is None else (length*s).long()
    start = (torch.rand(4, 3, generator=g)*((long + 2*(T//2) - T).clamp_min(0) + 1)[:, None]).long()
    got = windows(x, length, start, T, s)
    for i in range(4):
        y = x[i, :length[i]].float()
        if stretched: y = stretch(y, float(s[i]))
        y = F.pad(y, (T//2, T//2 + T))
        for j in range(3): torch.testing.assert_close(got[i, j], y[start[i, j]:start[i, j] + T], rtol=1e-4, atol=.02)

@pytest.mark.parametrize('T', [50, 51, 400])
def test_training_crops(T):
    "Every crop is a piece of its padded clip; all places come; each clip alone or with others is cut alike"
    data = clips()
    dl = SoundDL(data, 6, T=T)
    out = dl.draw(torch.zeros(3000, dtype=torch.long), seeded(1))
    assert out.shape == (3000, 1, 1, T) and out.dtype == torch.float32
    y = F.pad(data.clip(0), (T//2, T//2 + T))
    rows = {tuple(o.tolist()) for o in y.unfold(0, T, 1)[:len(data.clip(0)) + 2*(T//2) - T + 1]}
    assert {tuple(o.tolist()) for o in out[:, 0, 0]} == rows
    fixed = SoundDL(data, 4, T=T, crops=10)
    whole = fixed.draw(torch.arange(5))
    assert whole.shape == (5, 10, 1, T)
    for i in range(5): assert torch.equal(whole[i:i+1], fixed.draw(torch.tensor([i])))

def test_random_gain():
    x = torch.ones(4000, 1, 1, 2)
    y = random_gain(x, 6., seeded())[:, 0, 0]
    db = 20*y[:, 0].log10()
    assert torch.equal(y[:, 0], y[:, 1]) and -6 <= db.min() < -5.9 and 5.9 < db.max() <= 6 and abs(db.mean()) < .2
    assert random_gain(x.half(), 6., seeded()).dtype == torch.float16 and torch.equal(random_gain(x, 0., seeded()), x)

def test_settings_of_a_loader():
    for kw in (dict(T=0), dict(T=1), dict(T=2.5), dict(crops=0), dict(crops=2.5), dict(stretch=.9), dict(stretch=inf), dict(gain=-1), dict(gain=nan)):
        with pytest.raises(ValueError, match=f'{next(iter(kw))}: got'): SoundDL(clips(), 6, **{**dict(T=20), **kw})
    with pytest.raises(ValueError, match='T: how many samples'): SoundDL(clips(rate=8000), 6)
    with pytest.raises(TypeError, match='use draw'): SoundDL(clips(), 6, T=20).augment_batch(torch.zeros(2, 1, 1, 20))


# -- clips ----------------------------------------------------------------------------------------
def test_lists_of_clips():
    x = [np.array([1., -1., .5]), torch.tensor([0., .25]), [.1], np.array([1, -2, 3], dtype=np.int16)]
    s = SoundSet(x)
    assert s.x.shape == (4, 1, 1, 3) and s.x.dtype == torch.int16 and s.length.tolist() == [3, 2, 1, 3]
    assert s.clip(0).tolist() == [32767/32768, -1, .5] and s.clip(1).tolist() == [0, .25] and s.x[3, 0, 0].tolist() == [1, -2, 3]
    with pytest.raises(TypeError, match='lengths'): s._like(s.x[:1], s.y[:1])
    assert (s.hide_labels().y < 0).all() and len(s.new_empty()) == 0 and 'empty' in repr(s.new_empty())
    assert pickle.loads(pickle.dumps(s)).length.tolist() == s.length.tolist()

@pytest.mark.parametrize('kw, error, words', [
    (dict(x=[np.zeros((5, 2), np.int16)]), ValueError, 'mono'), (dict(x=[np.array([3.])]), ValueError, 'floats lie in'), (dict(x=[np.array([nan])]), ValueError, 'floats lie in'),
    (dict(x=[np.zeros(5, np.int32)]), TypeError, 'int16 or floats'), (dict(x=[]), ValueError, 'no clips'), (dict(x=[[]]), ValueError, 'empty clip'),
    (dict(x=[[0.]], y=['3']), TypeError, 'labels in `y` are strings'), (dict(x=[[0.]], y=np.array(['3'])), TypeError, 'strings'), (dict(x=[[0.]], y=[0, 1]), ValueError, 'SoundSet: 1 clips'),
    (dict(x=[[0.]], y=[-2]), ValueError, 'label -2'), (dict(x=[[0.]], fold=[1, 2]), ValueError, 'fold: 2 numbers for 1'), (dict(x=torch.zeros(2, 5)), ValueError, 'int16'),
    (dict(x=torch.zeros(2, 1, 1, 5, dtype=torch.int16), length=[0, 3]), ValueError, '`length` must be'), (dict(x=torch.zeros(2, 1, 1, 5, dtype=torch.int16), length=[6, 3]), ValueError, '`length`')], ids=str)
def test_clips_that_are_none(kw, error, words):
    with pytest.raises(error, match=words): SoundSet(**kw)

def test_folds():
    data, seen = clips(), []
    for f in (1, 2, 3, 4):
        s = fold_split(data, f)
        assert set(s.test.fold.tolist()) == {f} and f not in s.train.fold.tolist() and len(s.train) + len(s.test) == len(data)
        assert set(s.test.y.tolist()) == {0, 1, 2}
        seen += [tuple(o[:20].tolist()) for o in s.test.x[:, 0, 0]]
        for i in range(len(s.test)): assert len(s.test.clip(i)) == s.test.length[i]
    assert len(set(seen)) == len(data)   # each clip is in one test set
    with pytest.raises(ValueError, match=r'fold: got 9, the clips have \[1, 2, 3, 4\]'): fold_split(data, 9)
    with pytest.raises(ValueError, match='no folds'): fold_split(SoundSet([[0.]]), 1)


# -- files ----------------------------------------------------------------------------------------
wave = np.random.RandomState(0).uniform(-.9, .9, 300)

@pytest.mark.parametrize('kind, tol', [('float64', 2e-5), ('float32', 2e-5), ('int16', 6e-5), ('int32', 2e-5), ('uint8', .02)])
@pytest.mark.parametrize('stereo', [False, True])
def test_wav_files(kind, tol, stereo, tmp_path):
    x = np.stack([wave, -.5*wave], 1) if stereo else wave
    x = dict(int16=(x*32767), int32=x*(2**31 - 1), uint8=(x + 1)*127.5).get(kind, x).astype(kind)
    wavfile.write(tmp_path/'a.wav', 16_000, x)
    y = read_sound(tmp_path/'a.wav')
    assert y.dtype == np.int16 and y.shape == (300,)
    np.testing.assert_allclose(y/32768, .25*wave if stereo else wave, atol=tol)

@pytest.mark.parametrize('own', [8000, 44_100, 48_000, 11_025])
def test_other_rates(own, tmp_path):
    "A tone stays the same tone"
    wavfile.write(tmp_path/'a.wav', own, tone(.5, 500, own, own//4).numpy())
    y = read_sound(str(tmp_path/'a.wav'))
    f = abs(np.fft.rfft(y)).argmax()*16_000/len(y)
    assert abs(len(y) - 4000) < 12 and abs(f - 500) < 5 and abs(abs(y).max()/32768 - .5) < .05

def test_trim(tmp_path):
    assert trim(np.array([0, 0, 3, 0, 4, 0])).tolist() == [3, 0, 4] and trim(np.zeros(3)).tolist() == [0, 0, 0]
    wavfile.write(tmp_path/'a.wav', 16_000, np.array([0, 0, 5, 0, 7, 0], np.int16))
    assert read_sound(tmp_path/'a.wav').tolist() == [5, 0, 7]
    wavfile.write(tmp_path/'a.wav', 16_000, np.array([.1, 3., -7.]))   # louder than full scale
    assert read_sound(tmp_path/'a.wav').tolist() == [3277, 32767, -32768]

def test_broken_files(tmp_path):
    wavfile.write(tmp_path/'cut.wav', 16_000, (wave*32767).astype(np.int16))
    (tmp_path/'cut.wav').write_bytes((tmp_path/'cut.wav').read_bytes()[:30])
    (tmp_path/'junk.wav').write_bytes(b'RIFF????')
    (tmp_path/'none.wav').write_bytes(b'')
    wavfile.write(tmp_path/'empty.wav', 16_000, np.zeros(0, np.int16))
    wavfile.write(tmp_path/'nan.wav', 16_000, np.array([.1, nan, .2]))
    wavfile.write(tmp_path/'inf.wav', 16_000, np.array([.1, inf, .2]))
    for f in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError) as e: read_sound(f)
        assert str(f) in str(e.value)
    for name in ('no.wav', 'no.ogg'):
        if name == 'no.ogg': pytest.importorskip('soundfile')
        with pytest.raises(FileNotFoundError, match=name): read_sound(tmp_path/name)

def test_broken_ogg_and_other_formats(tmp_path):
    soundfile = pytest.importorskip('soundfile')
    (tmp_path/'a.ogg').write_bytes(b'OggS and nothing more')
    with pytest.raises(ValueError, match='a.ogg cannot be read: replace or remove'): read_sound(tmp_path/'a.ogg')
    soundfile.write(tmp_path/'b.flac', np.stack([wave, wave], 1), 16_000)
    np.testing.assert_allclose(read_sound(tmp_path/'b.flac')/32768, wave, atol=1e-4)

def test_without_soundfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'soundfile', None)
    (tmp_path/'a.ogg').write_bytes(b'x')
    with pytest.raises(ImportError, match='pip install soundfile'): read_sound(tmp_path/'a.ogg')
    wavfile.write(tmp_path/'a.wav', 16_000, wave)
    assert len(read_sound(tmp_path/'a.wav')) == 300   # wav files need nothing

def test_folder(tmp_path):
    for name,rate in (('dog/1-a.wav', 16_000), ('dog/2-b.WAV', 8000), ('cat/1-c.wav', 16_000)):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        wavfile.write(tmp_path/name, rate, wave)
    (tmp_path/'cat'/'readme.txt').write_text('no sound')
    s = sound_folder(tmp_path, fold=lambda f: int(f.name[0]))
    assert list(s.vocab) == ['cat', 'dog'] and s.y.tolist() == [0, 1, 1] and s.fold.tolist() == [1, 1, 2] and s.name == tmp_path.name
    with pytest.raises(ValueError, match='3 clips in 2 classes, ESC-10 has 400'): esc10(tmp_path)
    for f in (tmp_path/'cat', tmp_path/'nowhere'):
        with pytest.raises(ValueError, match='no sounds in class folders'): sound_folder(f)

ESC10 = os.environ.get('SSL_NOTES_ESC10', '')
@pytest.mark.skipif(not Path(ESC10 or '/-').is_dir(), reason='the folder of ESC-10 is not given by SSL_NOTES_ESC10')
def test_esc10():
    "400 clips, five folds of 80, eight of each class in each; two of them of seven seconds, not five; no zeros at the ends"
    pytest.importorskip('soundfile')
    data = esc10(ESC10)
    assert len(data) == 400 and data.c == 10 and data.rate == 16_000
    assert (data.fold*10 + data.y).bincount(minlength=60)[10:].tolist() == [8]*50 and (data.length > 90_000).sum() == 2
    x = data.x.flatten(1)
    assert (x[:, 0] != 0).all() and (x.gather(1, data.length[:, None] - 1) != 0).all()
    s = fold_split(data, 1)
    assert (len(s.train), len(s.test)) == (320, 80)


# -- ten crops in fastai --------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_probabilities(dtype):
    "Not of logits; a sum of 1; sure crops do not become nan; computed no coarser than in fp32"
    z = (3*torch.randn(20, 4, generator=seeded())).to(dtype)
    got = mean_log_softmax(z)
    want = z.double().softmax(1).view(2, 10, 4).mean(1).log()
    np.testing.assert_allclose(got.double(), want, atol=1e-5)
    sure = mean_log_softmax(torch.tensor([[1e4, 0.], [0., 1e4]], dtype=dtype), 2)
    np.testing.assert_allclose(sure.double().exp(), [[.5, .5]], atol=1e-3)

def test_predictions_are_means():
    "`validate`, `get_preds`, the test loader and the training clips; beside an `EMATeacher`; the input is given back whole"
    learn = quiet_fit(learner([BCSoundCallback(), EMATeacher(.5)]), 1, .1)
    teacher, data = learn.ema_teacher.teacher, learn.dls.valid.dataset
    x = learn.dls.valid.draw(torch.arange(len(data)))
    want = torch.stack([teacher(o[:, None]).softmax(1).mean(0) for o in x])
    with learn.no_bar():
        xs, p, y = learn.get_preds(with_input=True)
        loss, acc = learn.validate()
        again = learn.get_preds(dl=learn.dls.test_dl([data.clip(i) for i in range(len(data))]))[0]
        own = learn.get_preds(ds_idx=0)[0]
    torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)   # int16 and back
    assert torch.equal(torch.as_tensor(xs), x) and own.shape == (18, 3)
    assert math.isclose(loss, F.nll_loss(want.log(), data.y), rel_tol=1e-4) and math.isclose(acc, (want.argmax(1) == data.y).float().mean(), rel_tol=1e-5)

def test_training_rows_are_left_alone():
    rows = []
    quiet_fit(learner([BCSoundCallback()]), 1, cbs=Every('after_pred', lambda o: rows.append((o.training, len(o.pred), o.xb[0].ndim)), valid=True))
    assert rows == [(True, 6, 4)]*3 + [(False, 1, 4)]*6   # a tenth of the clips at a time, at least one

def test_validation_now_and_then():
    learn, seen = learner([ValidEvery(2)]), []
    quiet_fit(learn, 5, cbs=Every('before_batch', lambda o: seen.append(o.epoch) if not o.training else None, valid=True))
    assert sorted(set(seen)) == [1, 3, 4]
    with learn.no_bar(): assert len(learn.validate()) == 2


# -- the method -----------------------------------------------------------------------------------
@pytest.mark.parametrize('how', ['gain', 'energy', 'plain'])
@pytest.mark.parametrize('pairs', ['dataset', 'batch'])
def test_a_step_by_hand(how, pairs):
    "Mixture from what went in; labels with the ratio; one gain for the whole of it"
    cb, seen = BCSoundCallback(pairs=pairs, how=how, gain=6., seed=2), []
    mix = cb.mix
    def look(x1, x2, r):
        at = cb.generator.get_state()
        out = mix(x1, x2, r)
        g = torch.Generator()
        g.set_state(at)
        if how == 'plain': want = torch.stack([s*a + (1-s)*b for s,a,b in zip(r, x1, x2)])
        else:
            p = r if how == 'energy' else torch.stack([sound_ratio(gain(a.flatten(), 16_000), gain(b.flatten(), 16_000), s) for a,b,s in zip(x1, x2, r)])
            want = torch.stack([(s*a + (1-s)*b)/math.hypot(s, 1-s) for s,a,b in zip(p, x1, x2)])
        torch.testing.assert_close(out, random_gain(want, 6., g), rtol=1e-4, atol=1e-5)
        seen.append(len(x1))
        return out
    cb.mix = look
    quiet_fit(learner([cb]), 1)
    assert seen == [6, 6, 6]

@pytest.mark.parametrize('T', [50, 51, 400])
@pytest.mark.parametrize('kw', [dict(), dict(gain=6., pairs='batch')], ids=str)
def test_trains(kw, T):
    learn = quiet_fit(learner([BCSoundCallback(**kw)], partial(small_dls, T, stretch=1.25), T), 2, .1)
    assert np.isfinite(learn.recorder.losses).all() and np.isfinite(learn.recorder.values).all()

def test_silence_trains():
    quiet = SoundSet([np.zeros(100, np.int16)]*12, np.arange(12) % 3)
    learn = quiet_fit(learner([BCSoundCallback()], sound_dls(Splits(quiet, clips()), bs=6, T=50, device='cpu')), 1, .1)
    assert np.isfinite(learn.recorder.losses).all() and all(o.isfinite().all() for o in weights(learn).values())

def test_what_it_refuses():
    for kw in (dict(how='loud'), dict(gain=-1.), dict(gain=nan), dict(gain=inf), dict(pairs='all')):
        with pytest.raises(ValueError, match=f'{next(iter(kw))}: got'): BCSoundCallback(**kw)
    refused([BCSoundCallback()], 'rate: got 8000', dls=small_dls(data=clips(rate=8000)))
    quiet_fit(learner([BCSoundCallback(how='energy')], small_dls(data=clips(rate=8000))), 1)
    refused([BCSoundCallback(gain=6.)], 'gain: the loader changes each sound by 6', dls=small_dls(gain=6.))
    refused([BCSoundCallback(), BCLearningCallback()], 'cbs')
    one = clips()
    one.y.zero_()
    refused([BCSoundCallback()], 'of one class', dls=small_dls(data=one))
    dls = small_dls()
    with pytest.raises(ValueError, match='44100 Hz, but this'): dls.test_dl(clips(rate=44_100))
    with pytest.raises(TypeError, match='ImageDL'): dls.test_dl(DIGITS.test)
    with pytest.raises(ValueError, match='method: got'): envnet_learner(fold_split(clips(), 1), 'mixup')

def test_unlabelled_clips():
    s = fold_split(clips(), 1)
    refused([BCSoundCallback()], 'dls.train: ', 'label', dls=sound_dls(Splits(s.train.hide_labels(), s.test), bs=6, T=50, device='cpu'))

LOADERS = dict(one_pass=partial(small_dls, stretch=1.25, bs=7), stream=partial(small_dls, stretch=1.25, steps=4))
def whole_run(dls, folder, kw, cbs=(), every=2): return quiet_fit(learner([BCSoundCallback(gain=6., **kw), Checkpoint(folder, every=every), ValidEvery(2)], LOADERS[dls]), 3, .1, cbs=[*cbs])

@pytest.mark.parametrize('dls, kw, at, every', [('stream', {}, 6, 2), ('stream', dict(pairs='batch'), 5, 4), ('one_pass', {}, 5, 2), ('one_pass', dict(pairs='batch', seed=3), 4, 1), ('one_pass', {}, 4, 3)], ids=str)
def test_interrupted_and_resumed(dls, kw, at, every, tmp_path):
    def stop(o):
        if o.train_iter == at: raise RuntimeError('here')
    expected = whole_run(dls, tmp_path/'a', kw, every=every)
    with pytest.raises(RuntimeError): whole_run(dls, tmp_path/'b', kw, [Every('after_batch', stop)], every)
    torch.manual_seed(99)
    got = whole_run(dls, tmp_path/'b', kw, every=every)
    assert differences(*(read_checkpoint(o.checkpoint.files()[-1]) for o in (expected, got))) == []

def test_seeds_and_traces():
    "The same seed is the same run; `lr_find` and `validate` leave nothing behind"
    def run(seed, look=False):
        learn = learner([BCSoundCallback(gain=6., seed=seed)], LOADERS['stream'])
        at = learn.dls.train.state_dict()
        if look:
            with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False); learn.validate()
            learn.dls.train.load_state_dict(at)
        return weights(quiet_fit(learn, 1, .1))
    assert differences(run(0), run(0)) == [] == differences(run(0), run(0, True)) and differences(run(0), run(1))

def test_export_and_copies(tmp_path):
    learn = quiet_fit(learner([BCSoundCallback()], path=tmp_path), 1, .1)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    x = [clips(seed=5).clip(i) for i in range(3)]
    with learn.no_bar(), again.no_bar(): a, b = (l.get_preds(dl=l.dls.test_dl(x))[0] for l in (learn, again))
    assert torch.equal(a, b) and len(again.dls.train.dataset) == 0
    learn.remove_cb(cb := learn.bc_sound)
    assert differences(cb.state_dict(), deepcopy(cb).state_dict()) == [] == differences(cb.state_dict(), pickle.loads(pickle.dumps(cb)).state_dict())

@pytest.mark.parametrize('method', ['bc', 'standard'])
def test_envnet_learner(method):
    "The paper's network in small, on short crops: the rate falls at a half and three quarters"
    seen = []
    with pytest.raises(ValueError): envnet_learner(fold_split(clips(), 1), 'bc', T=100)   # too short for the network
    data = fold_split(clips(16, 2, lo=7000, hi=8000), 1)
    learn = envnet_learner(data, method, width=.25, fc=4, bs=6, T=7000, steps=1, gain=6., device='cpu')
    quiet_fit(learn, 4, .01, cbs=Every('before_step', lambda o: seen.append(o.opt.hypers[0]['lr'])))
    np.testing.assert_allclose(seen, [.01, .01, .001, .0001])
    assert learn.wd_bn_bias and np.isfinite(learn.recorder.losses).all()
