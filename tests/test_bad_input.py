"Each mistake gives an error that names the argument and the remedy, before anything is changed or lost."
import os, random, subprocess, sys
from functools import partial
from urllib.error import URLError

import numpy as np, pytest, torch, torchvision.datasets as tvd
from PIL import Image
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL

from ssl_notes.cli import main
from ssl_notes.core import Checkpoint, unlabeled_dl
from ssl_notes.data import ImageDL, ImageSet, get_dls, split_labels
from ssl_notes.mixmatch import MixMatchCallback

from helpers import DIGITS, Every, content, differences, digits_dls, learner, quiet_fit, tiny_net, weights

class Items:
    "Float images with labels: what a fastai loader of a user's own may give."
    def __init__(self, n=40, c=10, shape=(1, 8, 8), dtype=torch.float32, one_hot=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.rand(n, *shape, generator=g).to(dtype)
        self.y = torch.arange(n) % c
        self.rows = nn.functional.one_hot(self.y, c).float() if one_hot else self.y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.rows[i]

def loader(items, bs=8, shuffle=True): return TfmdDL(items, bs=bs, shuffle=shuffle, drop_last=shuffle, num_workers=0)

def own_dls(train=None, c=10, bs=8, **kw):
    dls = DataLoaders(loader(train or Items(c=c, **kw), bs), loader(Items(16, c, **kw), 8, False))
    dls.c = c
    return dls

def refused(learn, *words, error=ValueError, n_epoch=1):
    "No step is made, and the message has all `words`."
    w, mode = weights(learn), learn.model
    with pytest.raises(error) as e: quiet_fit(learn, n_epoch, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    now = weights(learn)
    assert differences(w, now) == [] and learn.model is mode
    return str(e.value)


# -- unlabelled data ------------------------------------------------------------------------------
def test_no_unlabelled_data():
    refused(learner([MixMatchCallback()], dls=own_dls()), 'unlabeled: MixMatchCallback has no unlabelled data',
            'pass a loader', 'unlabeled_dl(dls')

@pytest.mark.parametrize('what', [torch.zeros(9, 1, 8, 8), ['a.png'], 'folder', DIGITS.train])
def test_unlabelled_is_no_loader(what):
    refused(learner([MixMatchCallback(what)]), 'unlabeled: got a', 'expected an `ImageDL` or a fastai DataLoader',
            error=TypeError)

@pytest.mark.parametrize('kw, words', [
    (dict(shape=(1, 12, 12)), ['(1, 12, 12)', '(1, 8, 8)']), (dict(shape=(3, 8, 8)), ['(3, 8, 8)', '(1, 8, 8)']),
    (dict(dtype=torch.float64), ['float64', 'float32']), (dict(dtype=torch.uint8), ['uint8', 'float32'])])
def test_unlike_images(kw, words):
    unl = loader(Items(**kw))
    refused(learner([MixMatchCallback(unl)], dls=own_dls()), 'unlabeled: its images are', 'both must be alike', *words)

def test_unlike_image_sets():
    "The same with the loaders of this library, where sizes are known before"
    unl = ImageDL(torch.zeros(50, 1, 12, 12, dtype=torch.uint8), 8, index=True)
    refused(learner([MixMatchCallback(unl)]), 'unlabeled: its images are (1, 12, 12)', '(1, 8, 8)')

def test_unlabelled_set_smaller_than_its_batch():
    unl = loader(Items(5), 8, False)
    refused(learner([MixMatchCallback(unl)], dls=own_dls()), 'unlabeled: 5 images do not fill one batch of 8', 'bs=5')
    refused(learner([MixMatchCallback(ImageDL(DIGITS.train.subset(slice(5)), 8, index=True))]),
            'unlabeled: 5 images', 'bs=5')
    with pytest.raises(ValueError, match='batches of `bs`=64, but digits has only 10 images: take `bs`=10 or less'):
        get_dls(DIGITS, 1290, bs=64, include_labeled=False, balanced=False)

def test_no_unlabelled_items():
    with pytest.raises(TypeError, match='for image tensors use `ImageDL'): unlabeled_dl(digits_dls(), [1])

def test_batch_of_one():
    refused(learner([MixMatchCallback(loader(Items(), 8))], dls=own_dls(bs=1)),
            'dls.train: a batch of one labelled image', 'at least 2')
    refused(learner([MixMatchCallback(loader(Items(), 1))], dls=own_dls()), 'unlabeled: its batch size is 1', 'at least 2')

def test_labelled_set_smaller_than_its_batch():
    refused(learner([MixMatchCallback(loader(Items()))], dls=own_dls(Items(5))),
            'dls.train: 5 labelled images give no whole batch of 8', 'bs=5')

@pytest.mark.parametrize('bs, ubs', [(8, 10), (8, 4), (6, 4)])
@pytest.mark.parametrize('batchnorm', ['interleave', 'separate'])
def test_unequal_batches(bs, ubs, batchnorm):
    "Refused where chunks of one size are needed, and the remedy of the message works"
    refused(learner([MixMatchCallback(batchnorm=batchnorm)], dls=digits_dls(bs, ubs=ubs)), 'unlabeled: batches of', str(bs), str(ubs), "batchnorm='joint'")
    learn = quiet_fit(learner([MixMatchCallback(batchnorm='joint')], dls=digits_dls(bs, ubs=ubs)), 1)
    assert np.isfinite(learn.recorder.losses).all()

def test_no_classes_known():
    dls = own_dls()
    del dls.c
    learn = learner([MixMatchCallback(loader(Items()))], dls=dls)
    refused(learn, 'dls: it does not say its number of classes', 'set `dls.c`')


STOPPED = ValueError, FloatingPointError   # found in a running step


# -- labels ---------------------------------------------------------------------------------------
def test_fewer_labels_than_classes():
    with pytest.raises(ValueError, match='labels for 10 classes: give at least one per class'): digits_dls(n=9)

def test_labels_do_not_divide():
    with pytest.raises(ValueError, match='`n`=45 labels do not divide by 10 classes: take 40 or 50, or balanced=False'):
        digits_dls(n=45)
    assert len(split_labels(DIGITS.train.y, 45, balanced=False)) == 45

@pytest.mark.parametrize('label', [10, -1, 99])
def test_label_outside_the_classes(label):
    items = Items()
    items.rows = torch.full_like(items.y, label)
    refused(learner([MixMatchCallback(loader(Items()))], dls=own_dls(items)), 'step 0', 'label lies outside the 10 classes', error=STOPPED)

def test_labels_outside_in_an_image_set():
    with pytest.raises(ValueError, match='label 10 in `y`, but 10 classes in `vocab`: labels run from 0 to 9'):
        ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([3, 10]), range(10))

@pytest.mark.parametrize('rows', [torch.full((40, 10), .3), torch.zeros(40, 10)])
def test_rows_that_are_no_probabilities(rows):
    items = Items()
    items.rows = rows
    refused(learner([MixMatchCallback(loader(Items()))], dls=own_dls(items), loss_func=nn.CrossEntropyLoss(), metrics=[]),
            'step 0', 'does not sum to 1', error=STOPPED)

@pytest.mark.parametrize('rows', [torch.zeros(40, 4), torch.zeros(40), torch.zeros(40, 10, 1)])
def test_labels_of_another_shape(rows):
    items = Items()
    items.rows = rows
    refused(learner([MixMatchCallback(loader(Items()))], dls=own_dls(items), metrics=[]), 'labels: got shape', 'one row of 10')

def test_integer_and_one_hot_labels_are_equal():
    def run(one_hot):
        random.seed(0)
        dls = own_dls(one_hot=one_hot)
        learn = learner([MixMatchCallback(loader(Items(seed=1)), rampup=3)], dls=dls, metrics=[],
                        loss_func=nn.CrossEntropyLoss())
        quiet_fit(learn, 2, 1e-2)
        return learn
    a, b = run(False), run(True)
    assert a.recorder.losses == b.recorder.losses and differences(weights(a), weights(b)) == []
    np.testing.assert_allclose(a.recorder.values[-1], b.recorder.values[-1], rtol=1e-5)


# -- arguments ------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(T=0), dict(T=-.5), dict(T=float('nan')), dict(alpha=0), dict(alpha=-1.),
    dict(alpha=float('nan')), dict(K=0), dict(K=-1), dict(K=2.), dict(K=1.5), dict(K='2'), dict(K=None),
    dict(lambda_u=-1), dict(rampup=-1), dict(batchnorm='seperate'), dict(guess='ema')], ids=str)
def test_arguments(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError) as e: MixMatchCallback(**kw)
    assert name in str(e.value).split(':')[0] and repr(value) in str(e.value) and 'expected' in str(e.value)

@pytest.mark.parametrize('kw', [dict(lambda_u=float('nan')), dict(rampup=float('nan')), dict(lambda_u=float('inf')),
                                dict(ema=1.5), dict(ema=-.1), dict(ema=float('nan'))], ids=str)
def test_arguments_that_are_no_numbers(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): MixMatchCallback(**kw)

def test_teacher_guesses_but_there_is_none():
    with pytest.raises(ValueError, match="guess: 'teacher' needs one; give `ema`"): MixMatchCallback(guess='teacher', ema=None)


# -- numbers that are none ------------------------------------------------------------------------
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
def test_bad_pixels(bad, where):
    labelled, unlabelled = Items(), Items(seed=1)
    items = dict(labelled=labelled, unlabelled=unlabelled)[where]
    items.x[:, 0, 3, 3] = bad
    refused(learner([MixMatchCallback(loader(unlabelled))], dls=own_dls(labelled)),
            f'step 0: the {where} images are not finite', error=FloatingPointError)

@pytest.mark.parametrize('where', ['labelled', 'unlabelled'])
def test_one_bad_image(where, tmp_path):
    "Found when it is drawn; the weights are those before that step, the checkpoints before it stay"
    labelled, unlabelled = Items(), Items(seed=1)
    dict(labelled=labelled, unlabelled=unlabelled)[where].x[7] = float('nan')
    learn = learner([MixMatchCallback(loader(unlabelled)), Checkpoint(tmp_path, every=1, keep=99)], dls=own_dls(labelled))
    with pytest.raises(FloatingPointError, match=f'the {where} images are not finite') as e: quiet_fit(learn, 3)
    n = learn.mix_match.n_step
    assert f'step {n}:' in str(e.value) and len(learn.checkpoint.files()) == n
    assert all(v.isfinite().all() for v in weights(learn).values())

@pytest.mark.parametrize('n', [0, 2])
def test_bad_loss(n, tmp_path):
    "A weight that is not a number shows in the loss: step and term are named, the weights before it are on disk"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = tiny_net(), 0
        def forward(self, x):
            self.calls += self.training
            return self.net(x)*(float('nan') if self.training and self.calls > 5*n + 2 else 1.)   # 2 guess, 3 train
    learn = learner([MixMatchCallback(), Checkpoint(tmp_path, every=1, keep=99)], model=Net)
    with pytest.raises(FloatingPointError, match=f'step {n}: the loss term loss_x is not finite'): quiet_fit(learn, 2)
    assert learn.mix_match.n_step == n == len(learn.checkpoint.files())
    assert all(v.isfinite().all() for k,v in weights(learn).items() if 'running' not in k)


# -- networks -------------------------------------------------------------------------------------
@pytest.mark.parametrize('c', [1, 9, 11])
def test_wrong_number_of_outputs(c):
    for kw in (dict(), dict(batchnorm='joint')):
        refused(learner([MixMatchCallback(**kw)], model=partial(tiny_net, c)), 'model: it gives an output of shape',
                'for 10 classes', 'must have 10 outputs')

def test_output_of_wrong_shape():
    net = lambda: nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10))
    refused(learner([MixMatchCallback()], model=net), 'model: it gives an output of shape (8, 10, 6, 6) for 10 classes')


# -- data sets that are missing or damaged, by the command ----------------------------------------
def folder(path, n=6, size=8, test=True):
    "Three classes in the documented layout"
    rng = np.random.RandomState(0)
    for part in ['labeled'] + ['test']*test:
        for c in 'abc':
            (path/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.randint(0, 256, (size, size, 3), dtype=np.uint8)).save(path/part/c/f'{i}.png')
    (path/'unlabeled').mkdir()
    for i in range(n*4): Image.fromarray(rng.randint(0, 256, (size, size, 3), dtype=np.uint8)).save(path/f'unlabeled/{i}.png')
    return path

def command(*words, capsys):
    "Runs the command; it ends with 1, one line of error, and no table."
    code = main(list(words))
    out = capsys.readouterr()
    assert code == 1 and len(out.err.strip().splitlines()) == 1 and out.err.startswith('ssl_notes: '), (code, out.err)
    assert 'result file' not in out.out and 'Traceback' not in out.err
    return out.err

run = ['train', 'mixmatch', '--steps', '4', '--evals', '1', '--bs', '8']

@pytest.mark.parametrize('words, says', [
    (['--data', 'nowhere'], "no data set and no folder 'nowhere'"), (['--labels', '45'], '`n`=45'), (['--labels', '5'], '`n`=5'),
    (['--labels', '2000'], '`n`=2000'), (['--evals', '3'], 'steps: 4 updates do not divide into 3'),
    (['--evals', '0'], 'evaluations'), (['--bs', '1'], 'at least 2'), (['--bs', '2000'], '`bs`=2000'),
    (['--every', '0'], 'every: got 0'), (['--steps', '-4'], 'steps'), (['--seed', '-1'], 'seed')], ids=str)
def test_command_arguments(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says.lower() in command(*run, *words, capsys=capsys).lower()
    assert not list(tmp_path.rglob('*.pt')) and not list(tmp_path.rglob('*.json'))

@pytest.mark.parametrize('words', [['--labels', '-1'], ['--steps', '0'], ['--lr', '0'], ['--lr', '-1'], ['--width', '0', '--data', 'FOLDER']],
                         ids=str)
def test_command_zeros(words, tmp_path, capsys, monkeypatch):
    "Nought is not the same as not given"
    monkeypatch.chdir(tmp_path)
    if 'FOLDER' in words: words = [str(folder(tmp_path/'f')) if o == 'FOLDER' else o for o in words] + ['--size', '16']
    command(*run, *words, capsys=capsys)

def test_unknown_method(capsys):
    assert "method: got 'fixmtach', expected one of supervised, mixup" in command('train', 'fixmtach', capsys=capsys)

def test_unknown_command(capsys):
    assert main(['trian']) == 2 and 'usage: ssl_notes {train,demo,reproduce,bench,check}' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(['train', 'mixmatch', '--step', 'many'])
    assert e.value.code == 2

def test_damaged_picture(tmp_path, capsys):
    d = folder(tmp_path/'f')
    bad = d/'unlabeled/3.png'
    bad.write_bytes(bad.read_bytes()[:40])
    before = content(d)
    err = command(*run, '--data', str(d), '--size', '8', '--out', str(tmp_path/'o'), capsys=capsys)
    assert str(bad) in err and 'replace or remove it' in err
    assert content(d) == before and not (tmp_path/'o').exists()

def test_folder_without_classes(tmp_path, capsys):
    (tmp_path/'f').mkdir()
    assert 'labeled/CLASS/' in command(*run, '--data', str(tmp_path/'f'), capsys=capsys)

def test_folder_without_test_pictures(tmp_path, capsys):
    "The message names what the folder lacks, not an argument that the command does not have"
    d = folder(tmp_path/'f', test=False)
    assert 'test/CLASS' in command(*run, '--data', str(d), '--labels', '6', '--size', '8', '--out', str(tmp_path/'o'), capsys=capsys)

@pytest.mark.parametrize('damaged', [False, True])
def test_data_set_missing_or_damaged(damaged, tmp_path, capsys, monkeypatch):
    def offline(*args, **kw): raise URLError('no network')
    monkeypatch.setattr(tvd.cifar, 'download_and_extract_archive', offline)
    d = tmp_path/'cifar-10-batches-py'
    if damaged:
        d.mkdir()
        for n,_ in tvd.CIFAR10.train_list+tvd.CIFAR10.test_list: (d/n).write_bytes(b'half')
    before = content(tmp_path)
    err = command(*run, '--data', 'cifar10', '--root', str(tmp_path), '--out', str(tmp_path/'o'), capsys=capsys)
    assert ('data_batch_1 is damaged' if damaged else 'data_batch_1 is missing') in err
    assert 'Delete damaged files and fetch them' in err and str(tmp_path) in err
    assert content(tmp_path) == before

def test_damaged_checkpoint_by_command(tmp_path, capsys):
    out = ['--out', str(tmp_path/'o')]
    assert main([*run, *out]) == 0
    f = max((tmp_path/'o/checkpoints').glob('step_*'))
    f.write_bytes(f.read_bytes()[:1000])
    before = content(tmp_path)
    capsys.readouterr()
    assert str(f) in command(*run, *out, '--resume', capsys=capsys)
    assert content(tmp_path) == before

def test_other_seed_is_not_resumed(tmp_path, capsys):
    "A checkpoint of another seed, split or learning rate is another run"
    out = ['--out', str(tmp_path/'o')]
    assert main([*run, *out, '--seed', '1']) == 0
    before = content(tmp_path)
    capsys.readouterr()
    assert 'seed' in command(*run, *out, '--seed', '2', '--resume', capsys=capsys)
    assert content(tmp_path) == before

def test_folder_of_the_run_cannot_be_made(tmp_path, capsys):
    (tmp_path/'o').write_text('precious')
    assert str(tmp_path/'o') in command(*run, '--out', str(tmp_path/'o'), capsys=capsys)
    assert (tmp_path/'o').read_text() == 'precious'

def test_real_command_has_no_traceback(tmp_path):
    cmd = [sys.executable, '-W', 'ignore', '-m', 'ssl_notes', 'train', 'mixmatch', '--data', str(tmp_path/'none')]
    p = subprocess.run(cmd, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert p.returncode == 1 and 'Traceback' not in p.stderr + p.stdout
    assert p.stderr.strip().startswith('ssl_notes: no data set and no folder') and p.stderr.strip().count('\n') == 0
