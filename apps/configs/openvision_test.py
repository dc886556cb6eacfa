"""Tests of batch size, steps, warm-up and learning rate of the published recipes."""

import pytest

from apps.configs import clip_demo, openvision, openvision2
from apps.configs.base import clip_config
from apps.configs.objectives import OBJECTIVES, use_objective

STAGES = [
  # factor, base_lr, epochs, warm-up epochs, resolution -> batch, rate, steps, warm-up steps
  ("batch_factor=2,base_lr=8e-6,imagenet_epoch=10000,vitual_warmup_epoch=40,res=160",
   32_768, 1.024e-3, 390_981, 1_563),
  ("batch_factor=1,base_lr=4e-7,imagenet_epoch=800,virtual_warmup_epoch=20,res=224",
   16_384, 2.56e-5, 62_556, 1_563),
  ("batch_factor=0.5,base_lr=1e-7,imagenet_epoch=200,virtual_warmup_epoch=0,res=384",
   8_192, 3.2e-6, 31_278, 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "batch", "rate", "steps", "warmup"), STAGES)
def test_published_stages(text, batch, rate, steps, warmup):
  config = openvision.get_config(text + ",img=S/16,txt_name=S/16,txt_decoder_name=S")
  assert config.batch_size == batch
  assert config.optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
  assert (config.total_steps, config.optimizer.schedule.warmup_steps) == (steps, warmup)
  assert (config.model.encoder, config.model.text, config.model.decoder) == ("S/16", "S", "S")
  assert (config.loss.clip, config.loss.caption) == (1.0, 2.0)
  assert (config.model.token_len, config.model.caption_len) == (80, 128)
  assert config.input.sentence_positive


def test_text_keys_of_the_published_data():
  config = openvision.get_config("txt_key1=txt,txt_key2=llava_caption+recaption")
  assert config.input.alt_keys == ("txt",)
  assert config.input.caption_keys == ("llava_caption", "recaption")


def test_arguments_without_effect_log_a_reason(caplog):
  config = openvision.get_config("concat=false,prob=1.0,load_pretrain=False")
  assert config.init_from.path == "" and config.to_dict() == openvision.get_config().to_dict()
  assert "'load_pretrain' has no effect: it has no effect in the published code" in caplog.text


@pytest.mark.parametrize("value", ["False", "True", "", "/runs/a"])
@pytest.mark.parametrize("recipe", [openvision, openvision2])
def test_load_pretrain_is_not_a_path(recipe, value):
  assert recipe.get_config(f"load_pretrain={value}").init_from.path == ""


def test_use_sovit_sets_embedding_dimension():
  assert openvision.get_config("use_sovit=true,img=L/14").model.embed_dim == 1152
  assert openvision.get_config("use_sovit=false").model.embed_dim == 0


@pytest.mark.parametrize("recipe", [openvision, openvision2])
def test_old_remat_values(recipe):
  published = ("none", "full", "minimal", "minimal_offloaded", "minimal_flash")
  found = [recipe.get_config(f"remat={value}").model.remat for value in published]
  assert found == ["none", "full", "dots", "offload", "dots"]


@pytest.mark.parametrize(
  ("recipe", "text", "message"),
  [
    (
      openvision2,
      "txt_name=L/16",
      "'txt_name' is not an argument of this recipe: OpenVision 2 has no text",
    ),
    (openvision2, "output_token_len=128", "token_len is the length of the caption here"),
    (openvision2, "txt_key1=txt", "give its name as txt_key"),
    (openvision2, "concat=False", "OpenVision 2 has one text; leave it out"),
    (openvision, "keep_ratio=0.35", "sees every image token; leave it out"),
    (openvision, "use_openclip_tokenizer=True", "tokenizer.json of one as vocab_path"),
    (openvision2, "use_openclip_tokenizer", "tokenizer.json of one as vocab_path"),
    (openvision, "img_head=False", "the image tower always has its head"),
    (openvision, "init=False", "init=False: expected a path, such as init=/runs/a"),
    (
      openvision,
      "txt_key1=txt,llava_caption",
      "'llava_caption'; values cannot contain a comma .*joined with",
    ),
    (openvision, "runlocal=1", "runlocal='1': expected true or false"),
    (openvision2, "color_jitter=yes", "color_jitter='yes': expected true or false"),
  ],
)
def test_errors_for_unsupported_published_arguments(recipe, text, message):
  with pytest.raises(ValueError, match=message):
    recipe.get_config(text)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_enable_required_towers(name):
  config = clip_demo.get_config(f"loss={name}")
  contrastive = config.loss.clip + config.loss.siglip
  assert bool(config.model.text) == bool(contrastive)
  assert bool(config.model.decoder) == bool(config.loss.caption)
  assert config.input.sentence_positive == (name == "openvision")
  assert (config.model.bias_init is None) == (name != "siglip")


def test_unknown_objective():
  with pytest.raises(ValueError, match="loss='clap': expected one of openvision, clip"):
    use_objective(clip_config(), "clap")
