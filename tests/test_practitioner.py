"A folder of labelled and a folder of unlabelled pictures, a fastai Learner, and one callback more."
import json

import fastai.callback.schedule # fit_one_cycle
import matplotlib; matplotlib.use('Agg')
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import GrandparentSplitter, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from ssl_notes.cli import main
from ssl_notes.core import Checkpoint, EMATeacher, unlabeled_dl
from ssl_notes.mixmatch import MixMatchCallback, mixmatch_adam

from helpers import finite, DIGITS, Every, differences, quiet_fit, weights

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Digits 0, 1, 2 as RGB files: 24 with a class, 60 without, 30 for testing"
    d, y = tmp_path_factory.mktemp('pictures'), DIGITS.train.y
    def write(i, f):
        f.parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(DIGITS.train.x[i, 0].numpy()).convert('RGB')
        im.resize((32, 32), Image.BILINEAR).save(f)
    for c in range(3):
        at = (y == c).nonzero()[:, 0].tolist()
        for part,r in (('labeled', range(8)), ('test', range(8, 18))):
            for i in r: write(at[i], d/part/str(c)/f'{i}.png')
        for i in range(18, 38): write(at[i], d/'unlabeled'/f'{c}_{i}.png')
    return d

def dataloaders(d, **kw):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
        splitter=RandomSplitter(.25, seed=0), item_tfms=Resize(32), batch_tfms=aug_transforms(size=32))
    return block.dataloaders(d/'labeled', **{**dict(bs=8, num_workers=0, device='cpu'), **kw})

class TimmLike(nn.Module):
    "The interface of timm's models: `forward_features`, `forward_head`, `head`, `num_features`."
    def __init__(self, num_classes):
        super().__init__()
        self.num_features = 16
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.GELU())
        self.blocks = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, num_classes)
    def forward_features(self, x):
        x = self.stem(x)
        return x + self.blocks(x)
    def forward_head(self, x, pre_logits=False):
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.head(x)
    def forward(self, x): return self.forward_head(self.forward_features(x))

def make(kind, dls, cb, **kw):
    torch.manual_seed(0)
    if kind == 'timm': return Learner(dls, TimmLike(dls.c), metrics=accuracy, cbs=cb, **kw)
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=cb, **kw)

@pytest.mark.parametrize('kind', ['vision', 'timm'])
def test_story(kind, pictures, tmp_path):
    dls = dataloaders(pictures, path=tmp_path)
    dls.path = tmp_path
    files = get_image_files(pictures/'unlabeled')
    assert len(files) == 60
    cb = MixMatchCallback(unlabeled=unlabeled_dl(dls, files), rampup=4, ema=.9)
    learn = make(kind, dls, cb)
    before, rows = weights(learn), []
    look = Every('after_pred', lambda cb: rows.append((cb.pred.shape, cb.mix_match.targets.shape)))
    quiet_fit(learn, 2, 1e-3, cbs=look)
    assert rows == [((8, 3), (24, 3))]*4 and learn.mix_match.n_step == 4
    assert differences(before, weights(learn)) and finite(learn)
    with learn.no_bar(), learn.no_logging():
        learn.show_results(max_n=4)
        dls.show_batch(max_n=4)
        one = sorted(get_image_files(pictures/'test'))[5]
        was, acc = learn.predict(one), learn.validate()[1]
        all_was = learn.get_preds(dl=dls.test_dl(files[:10]))[0]
        valid, targs = learn.get_preds()
    assert abs(float((valid.argmax(1) == targs).float().mean()) - acc) < 1e-5
    learn.export('a.pkl')
    size = (tmp_path/'a.pkl').stat().st_size
    again = load_learner(tmp_path/'a.pkl')
    with again.no_bar(), again.no_logging():
        now = again.predict(one)
        all_now = again.get_preds(dl=again.dls.test_dl(files[:10]))[0]
    assert now[0] == was[0] and torch.equal(now[2], was[2]) and torch.equal(all_now, all_was)
    fresh = make(kind, dataloaders(pictures), MixMatchCallback(ema=.9))
    fresh.path = tmp_path
    fresh.ema_teacher._make()
    fresh.export('fresh.pkl')
    assert size < (tmp_path/'fresh.pkl').stat().st_size + 50_000   # no unlabelled picture, no batch

def test_adopted_teacher_alone(pictures, tmp_path):
    "`adopt` puts the average into the model: without the callbacks it predicts the same"
    dls = dataloaders(pictures)
    learn = make('timm', dls, MixMatchCallback(unlabeled=unlabeled_dl(dls, get_image_files(pictures/'unlabeled')), ema=.5))
    quiet_fit(learn, 1, 1e-2)
    with learn.no_bar(): was = learn.get_preds()[0]
    learn.ema_teacher.adopt()
    learn.remove_cb(MixMatchCallback)
    assert not hasattr(learn, 'ema_teacher')
    with learn.no_bar(): assert torch.equal(was, learn.get_preds()[0])

def test_frozen_body(pictures):
    "`fine_tune`: the body is frozen in the first epoch, and the teacher goes on through the second"
    dls = dataloaders(pictures)
    learn = make('vision', dls, MixMatchCallback(unlabeled=unlabeled_dl(dls, get_image_files(pictures/'unlabeled'))))
    learn.freeze()
    conv, w = learn.model[0][0], learn.model[0][0].weight.detach().clone()
    quiet_fit(learn, 1, 1e-3)
    assert torch.equal(conv.weight, w)
    learn.unfreeze()
    quiet_fit(learn, 1, 1e-3)
    assert not torch.equal(conv.weight, w) and learn.ema_teacher.n_updates == learn.mix_match.n_step == 4

@pytest.mark.parametrize('workers', [0, 2])
def test_workers(workers, pictures):
    "Files may be read by worker processes, as fastai does by default"
    dls = dataloaders(pictures, num_workers=workers)
    unl = unlabeled_dl(dls, get_image_files(pictures/'unlabeled'))
    assert unl.fake_l.num_workers == workers
    learn = make('timm', dls, MixMatchCallback(unlabeled=unl))
    quiet_fit(learn, 3, 1e-3)   # 6 steps of 8: the second permutation of 60 is not reached
    quiet_fit(learn, 2, 1e-3)   # but here it is
    assert learn.mix_match.n_step == 10
    learn.mix_match.stream.it = None

def test_views_are_augmented_by_the_training_transforms(pictures):
    dls = dataloaders(pictures)
    seen = []
    learn = make('timm', dls, MixMatchCallback(unlabeled=unlabeled_dl(dls, get_image_files(pictures/'unlabeled')), alpha=None,
                                               batchnorm='joint'))
    quiet_fit(learn, 1, 1e-3, cbs=Every('after_pred', lambda cb: seen.append(cb.xb[0].detach().clone())))
    a, b = seen[0][8:16], seen[0][16:]
    assert a.shape == b.shape == (8, 3, 32, 32) and not torch.equal(a, b)
    assert (a-b).abs().mean() < (a-b.roll(1, 0)).abs().mean()   # two views of the same pictures

def test_bad_loaders(pictures):
    dls = dataloaders(pictures)
    files = get_image_files(pictures/'unlabeled')
    for unl in (dls.test_dl(files), dls.valid):
        unl = unl.new(bs=2)
        learn = make('timm', dls, MixMatchCallback(unlabeled=unl))
        w = weights(learn)
        with pytest.raises(ValueError, match='unlabeled: this loader applies validation transforms.*unlabeled_dl'):
            quiet_fit(learn, 1)
        assert differences(w, weights(learn)) == []
    with pytest.raises(ValueError, match='there is not one unlabelled item; is the folder right'):
        unlabeled_dl(dls, get_image_files(pictures/'nothing'))

def test_resumed(pictures, tmp_path):
    def run(d, stop=None):
        import random
        random.seed(0); torch.manual_seed(0)
        dls = dataloaders(pictures)
        learn = make('timm', dls, [MixMatchCallback(unlabeled=unlabeled_dl(dls, get_image_files(pictures/'unlabeled'))),
                                   Checkpoint(d, every=1)])
        def cut(cb):
            if cb.train_iter == stop: raise KeyboardInterrupt
        return quiet_fit(learn, 3, 1e-3, how='fit_one_cycle', cbs=Every('after_batch', cut))
    whole = run(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'b', 3)
    resumed = run(tmp_path/'b')
    assert differences(weights(whole), weights(resumed)) == []
    assert differences(weights(whole.ema_teacher.teacher), weights(resumed.ema_teacher.teacher)) == []

@pytest.mark.parametrize('method, labels', [('mixmatch', '12'), ('mixmatch', None), ('supervised', '12')])
def test_command_on_a_folder(method, labels, pictures, tmp_path, capsys):
    args = ['train', method, '--data', str(pictures), '--steps', '4', '--evals', '2', '--bs', '4', '--size', '16',
            '--width', '.25', '--out', str(tmp_path/'o')] + (['--labels', labels] if labels else [])
    assert main(args) == 0, capsys.readouterr().err
    r = json.loads((tmp_path/'o/result.json').read_text())
    assert r['method'] == method and 0 <= r['accuracy'] <= 1 and 'on 30 test images' in r['protocol']
    assert [row['step'] for row in r['curve']] == [2, 4]

def test_later_transforms_reach_the_unlabelled_images(tmp_path):
    "`vision_learner` with a pretrained network adds `Normalize` to the loaders after `unlabeled_dl` was called."
    from fastai.data.transforms import Normalize
    from fastai.vision.augment import aug_transforms
    from ssl_notes.core import ViewStream
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(4): PILImage.create(torch.full((16, 16, 3), 100, dtype=torch.uint8).numpy()).save(tmp_path/c/f'{i}.png')
    files = get_image_files(tmp_path)
    dls = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, batch_tfms=aug_transforms(size=16)).dataloaders(files, bs=2, num_workers=0)
    stream = ViewStream(unlabeled_dl(dls, files), K=2)
    plain = next(stream)[0]
    dls.add_tfms([Normalize.from_stats([.5]*3, [.25]*3, cuda=False)], 'after_batch')
    normal = next(stream)[0]
    assert plain.min() >= 0
    assert torch.allclose(normal.mean(), (plain.mean() - .5)/.25, atol=.5) and normal.min() < 0
