"""Mistakes that people make, each with words of what answers it, and what looks like one and is taken."""

from collections.abc import Callable, Mapping

import pytest

import unclip

TABLE = """
rnu mine.yaml                                     | unknown command rnu; did you mean run?
--verison                                         | unknown option --verison; did you mean --version?
plan                                              | unclip plan: CONFIG is missing; write unclip plan CONFIG
plan nowhere.yaml                                 | nowhere.yaml: no such configuration; unclip init writes one
plan none                                         | none: cannot be read (Is a directory); name a YAML file
plan mine                                         | mine: no such configuration; did you mean mine.yaml?
plan list.csv                                     | expected a mapping of stages; if it is a list, unclip init
plan tab.yaml                                     | tab.yaml: not valid YAML: ~line 2, column 1
plan empty.yaml                                   | empty.yaml is empty; unclip init writes a configuration
run mine.yaml --unitl pairs                       | unclip run: unknown option --unitl; did you mean --until?
run mine.yaml --until pair                        | unknown stage pair; did you mean pairs?
run mine.yaml --only decoder                      | --only decoder needs source, ~use --until decoder
run mine.yaml --only decoder --until pairs        | --only and --until exclude each other
submit mine.yaml --to http://[::1:8265            | http://[::1:8265 is not the address of a dashboard
run mine.yaml -q -v                               | -v/--verbose ~exclude each other; leave one of them out
run mine.yaml --decoder.samples=100               | write values without dashes: decoder.samples=100
run mine.yaml decoder.samples 100                 | decoder.samples 100: not understood here; ~[KEY=VALUE ...]
plan mine.yaml decoder.samples=many               | decoder.samples: expected a whole number, got 'many'
plan mine.yaml decoder.samles=100                 | decoder.samles: unknown key; did you mean samples?
plan mine.yaml decodr.samples=100                 | decodr: unknown key; did you mean decoder?
plan mine.yaml preset=hug                         | preset: 'hug' is not one of nano, tiny, small
plan mine.yaml decoder.model.dropout=2            | dropout is 2.0: use a share from 0 up to but not including 1
plan mine.yaml decoder=3                          | decoder: expected a mapping, got 3
plan mine.yaml project=../up                      | '../up' is not a plain name; use letters, digits
plan mine.yaml store=list.csv                     | store list.csv: is a file; name a folder
plan mine.yaml run.trackers=tensorboard           | run.trackers: expected a list, got ~; write [tensorboard]
plan mine.yaml source.paths=list.csv              | source.paths: expected a list, got 'list.csv'
plan mine.yaml source.paths=[rows.csv]            | ~write a line above it, such as url;caption
plan mine.yaml source.paths=[old.csv]             | not UTF-8: ~'Mädchen' in cp1252, ~set source.encoding
plan mine.yaml source.encoding=windows            | encoding: 'windows' is unknown; use a name such as cp1252
plan mine.yaml source.paths=[bare.csv]            | bare.csv: no column caption; it has url
plan mine.yaml source.paths=[header.csv]          | header.csv: no rows
plan mine.yaml clip.weights=ViT-B-32              | use train, open_clip:NAME:TAG or local-dir:FOLDER
run mine.yaml --events none/none/file             | --events none/none/file: cannot be written ~name a file in a folder
plan mine.yaml run.decoder.device=gpu             | run.decoder.device
plan mine.yaml --gpus 1xM60                       | unknown kind M60
plan mine.yaml --gpus "1xApple M3 Max"            | Apple's GPUs are not used; leave it out
plan mine.yaml --pairs 0                          | --pairs 0: plan for 1 pair or more
plan mine.yaml --utilisation 2                    | --utilisation 2: use a share above 0 and at most 1
submit mine.yaml                                  | unclip submit: --to is missing
submit mine.yaml --to slurm                       | --to slurm: write http://slurm:8265 if that is a cluster's head
submit mine.yaml --to http://127.0.0.1:9          | no Ray cluster answers at http://127.0.0.1:9 ~start it, or correct
submit mine.yaml --to kuberay                     | is a folder, which no pod can reach; use s3://BUCKET/PREFIX
init "" list.csv                                  | project: '' is not a plain name
init my tars/{00..10}.tar                         | ; patterns are not expanded: name the folder
init my links.csv                                 | has link, TEXT. Set source.image_column ~here with --image
init my two.csv                                   | no column caption; prompt and text could be meant
init my bare.tsv                                  | line 1 must name the columns, but is a row ~<tab>a cat)
init my old.csv                                   | 'Mädchen' in cp1252, 'Mдdchen' in cp1251
init mine list.csv                                | mine.yaml exists already and is not overwritten
init ../photos                                    | a name comes first; write unclip init my-project ../photos
init list.csv                                     | a name comes first; write unclip init my-project list.csv
init my photos                                    | no rows; it has no image, tar or table: 1 file ~readme.md
init my none                                      | source none: no rows; it has no image, tar or table
init my array.jsonl                               | array.jsonl: line 1 ~write one JSON object per line
init my book.xlsx                                 | book.xlsx: not a spreadsheet that can be read
init my book.docx                                 | book.docx: not a .parquet, .csv, ~save it as one
init my list.csv preset=nano                      | preset=nano: init takes lists and no KEY=VALUE; write it into
init my kohya.json --image-column bild            | kohya's JSON have no column bild; leave out image_column
init my gone.csv                                  | gone.csv: no such file or folder in
sample cat                                        | no finished bundle under out/; run one first
sample cat --from none                            | none: no finished bundle there; name a run's output folder
sample cat --seed -1                              | seed -1 is below 0
sample cat --seed 9007199254740992                | seed 9007199254740992 is too large; use one below
sample cat -n 0                                   | n is 0; use 1 to 1000
sample cat -n 4 -o cat.png                        | --to cat.png: 4 images do not fit into one file; name a folder
sample cat -o cat.jpg                             | --to cat.jpg: the output is a .png file; name one, or a folder
sample cat --negative-prompt "an ugly dog"        | negative_prompt is not known here: guidance leads away from
sample cat generator=7                            | generator is not known here: give its seed
sample cat width=512                              | width is not known here: images are square
sample missing.png                                | missing.png: no such file, and sample takes captions
sample cat size=300                               | size is 300: use 64, 256, 512 or 1024
sample cat sampler=euler                          | give decoder_sampler (ddpm, ddim or dpm) or prior_sampler (
sample cat size=1792x1024                         | size is 1792x1024, and images are square
sample cat guidance_scal=7                        | ['guidance_scal']: did you mean guidance_scale?
sample cat steps=20 num_inference_steps=30        | num_inference_steps: decoder_steps is given twice
redraw gone.png                                   | gone.png: cannot be read (No such file or directory); name a PNG
redraw cat.gif                                    | cat.gif: has no recipe; PNG files of unclip carry one
sample cat --seed x                               | --seed: 'x' is not a number
sample cat --device gpu                           | --device: unknown value gpu; did you mean cpu?
edit varation cat.gif                             | unknown command varation; did you mean variations?
edit vary gone.png --from none              | gone.png: cannot be read (No such file or directory); name an image
edit change cat.gif a a --from none               | both captions are 'a'; describe the wanted image
edit vary cat.gif --count 0 --from none           | n is 0; use 1 to 1000
show                                              | name a configuration, or --store URL
show mine.yaml abc                                | no artefact in ~unclip show without a key lists
show --store gone                                 | --store gone: no such folder; name a store
show --store none run.lease_s=3                   | neither a configuration nor values
show none                                         | no store in none to take; name a configuration, or --store URL
report mine.yaml                                  | nothing has been made yet; use unclip run
data search mine.yaml                             | CAPTION or --image: one of them is needed
data search mine.yaml cat                         | not made for the current list ~with unclip run --until index
data search mine.yaml cat --count 0               | --count 0 is below 1
data retry mine.yaml --reason timout              | unknown reason timout; did you mean timeout?
data forget mine.yaml                             | nothing to forget: give keys, references or hashes, or --file
data forget mine.yaml --file gone.txt             | --file gone.txt: cannot be read (No such file or directory)
data gc mine.yaml --grace-hours -1 --yes          | --grace-hours -1 is below 0
pin mine.yaml decoder                             | decoder cannot be pinned; clip, codec can
pin mine.yaml clip                                | unclip run with --until clip makes what the configuration asks for
completion bsh                                    | unknown value bsh; did you mean bash?
logs mine.yaml                                    | unknown command logs; unclip show CONFIG shows its progress
status mine.yaml                                  | unknown command status; unclip show CONFIG shows its progress
stop mine.yaml                                    | unknown command stop; Ctrl-C stops a run
train mine.yaml                                   | unknown command train; unclip run CONFIG trains all models
help realese                                      | unknown command realese; did you mean release?
data lok list.csv                                 | unknown command lok; did you mean look?
data                                              | COMMAND is missing; write unclip data COMMAND
run mine.yaml --output out2                       | unknown option --output; write run.output=FOLDER
run mine.yaml --resume                            | --resume; leave it out: the same command resumes
run mine.yaml --force                             | --force; leave it out: stages made stale by a changed value or list
run mine.yaml --gpus 1                            | --gpus; leave it out: all GPUs are used
plan mine.yaml sampling.size=256                  | sampling: unknown key; did you mean bundle.sampling?
plan mine.yaml size=256                           | size: unknown key; did you mean bundle.sampling.size
plan mine.yaml batch=12                           | batch: unknown key; did you mean STAGE.batch (~decoder
plan mine.yaml epochs=10                          | epochs: unknown key; did you mean STAGE.samples (~decoder
plan mine.yaml lr=1e-4                            | lr: unknown key; did you mean STAGE.learning_rate (~decoder
plan mine.yaml device=0                           | device: unknown key; did you mean run.STAGE.device (STAGE: clip
plan mine.yaml decoder.lr=1e-4                    | decoder.lr: unknown key; it is called learning_rate
plan mine.yaml decoder.epochs=3                   | decoder.epochs: unknown key; it is called samples, the number
plan mine.yaml source.paths=[TRAIN.csv]           | split 'TRAIN' is not train, ~name another column
plan mine.yaml store=s3:/bucket                   | store s3:/bucket: no bucket; write s3://BUCKET/PREFIX
plan mine.yaml store=ftp://host/a                 | only a folder or s3://, gs:// or az:// and BUCKET/PREFIX
plan mine.yaml --gpus RTX4090                     | not a number of GPUs; write it as 1xRTX4090
submit mine.yaml --to k8s                         | --to k8s: ~or else local or kuberay
init hub OWNER/NAME                               | a dataset of the Hugging Face Hub is hf://datasets/OWNER/NAME
init hub hf://datasets/                           | Missing repository id. Write hf://datasets/OWNER/NAME
init my cat.gif                                   | cat.gif: not a .parquet, .csv, ~nor a folder; save it as one
edit vary https://h.test/a.png --from none        | https://h.test/a.png: only local files are opened; download it
sample cat -o strip.jpg                           | --to strip.jpg: the output is a .png file
sample cat --device mps                           | --device: unknown value mps; known are auto, cpu, cuda
serve --port 80000                                | serve.port: 80000 is above 65535
data retry mine.yaml                              | not made for the current list and recipes: pairs; make them
release rollback mine.yaml                        | no release exists before the first to go back to
export mine.yaml --to hf://me/model               | hf://me/model: only a folder or s3://, gs:// or az://
plan ""                                           | CONFIG: '' is empty; is a variable of the shell not set?
show ""                                           | CONFIG: '' is empty
init my ""                                        | SOURCE: '' is empty
sample ""                                         | CAPTION: '' is empty; ~write unclip sample CAPTION ...
inpaint cat.gif                                   | unknown command inpaint; did you mean unclip edit inpaint?
forget mine.yaml a.png                            | unknown command forget; did you mean unclip data forget?
download list.csv                                 | unknown command download; unclip run CONFIG --until pairs fetches
finetune list.csv                                 | unknown command finetune; unclip init NAME LIST --from WHERE
run mine.yaml --preset nano                       | unknown option --preset; write preset=NAME
init my list.csv --preset nano                    | unknown option --preset; with unclip run CONFIG, write preset=NAME
run mine.yaml --until training                    | unknown stage training; known are ar_prior, bundle, captions, clip
run mine.yaml --epochs 10                         | unknown option --epochs; write STAGE.samples=VALUE, such as decoder
run mine.yaml +decoder.samples=100                | +decoder.samples=100: not understood here; ~[KEY=VALUE ...]
plan mine.yaml run.trackers=[comet]               | run.trackers: comet is neither module:function nor one of tensor
plan mine.yaml store=gcs://bucket/a               | only a folder or s3://, gs:// or az:// and BUCKET/PREFIX
plan mine.yaml source.paths=[fold1.csv]           | split 'fold1' is not train, ~name another column
plan mine.yaml source.paths=[moved]               | source moved: no such file or folder in
init "my project" list.csv                        | 'my project' is not a plain name; use letters, digits
init my pairs.zip                                 | the only compressed tables are .csv.gz, ~; unpack it first
init my apart                                     | no row has a caption, ~a.txt for a.jpg~1 .txt without an image
init my suffixes                                  | no row has a caption, ~1 .txt without an image (such as a.jpg.txt)
generate gone.txt --from none                     | gone.txt: cannot be read (No such file or directory)
generate book.docx --from none                    | book.docx: not a list of prompts; give a .txt with a prompt a line
export none --to photos                           | photos is not empty; name a new folder
edit vary drawing.svg --from none                 | drawing.svg: cannot be used (not_an_image
edit vary cat.gif --from none -o strip.jpg        | --to strip.jpg: the output is a .png file
show mine.yaml decoder                            | no artefact in ~unclip show without a key lists
submit mine.yaml --to 127.0.0.1:9                 | no Ray cluster answers at http://127.0.0.1:9 ~start it, or correct
submit mine.yaml --to localhost:9                 | no Ray cluster answers at http://localhost:9 ~start it, or correct
submit mine.yaml --to ray://127.0.0.1:10001       | ray://127.0.0.1:10001 ~write http://HOST:8265
sample cat --count 0                              | n is 0; use 1 to 1000
sample cat --num-images 0                         | n is 0; use 1 to 1000
sample cat guidance_scale=much                    | guidance_scale: expected a number, got 'much'
sample cat seed=-1                                | seed -1 is below 0
sample cat --steps 1                              | decoder_steps is 1: use 2 or more
sample cat sise=64                                | ['sise']: did you mean size?
plan mine.yaml presett=nano                       | presett: unknown key; did you mean preset?
plan mine.yaml run.device=cpu                     | run.device: unknown key; did you mean run.STAGE.device (STAGE: cl
plan mine.yaml --gpus 0xH100                      | --gpus 0xH100: name at least 1 GPU
plan mine.yaml --gpus "RTX 3060"                  | not a number of GPUs; write it as '1xRTX 3060'
run mine.yaml --batch_size 8                      | --batch_size; write STAGE.batch=VALUE, such as decoder.batch=...
run mine.yaml --batch-size 8                      | --batch-size; write STAGE.batch=VALUE, such as decoder.batch=...
plan mine.yaml --num_processes 2                  | --num_processes; write run.STAGE.workers=N, such as run.decoder
sample cat --num_inference_step 5                 | --num_inference_step; did you mean --num_inference_steps?
sample cat --from OWNER/NAME                      | one on the Hugging Face Hub has to be downloaded first: hf download
"""
# What other tools write and people do, which is taken as it is: what is printed says what was made of it.
TAKEN = """
init a utf16.csv                                  | pairs found: 1
init a semicolons.csv                             | pairs found: 1
init a tabs.txt                                   | pairs found: 1
init a laion.csv                                  | pairs found: 1
init a numbers.csv                                | pairs found: 2
init a five.csv                                   | pairs found: 1
init a hub.parquet                                | pairs found: 2
init a coco/annotations/captions_val2017.json     | pairs found: 1
init a llava.json                                 | pairs found: 1
init a kohya.json                                 | pairs found: 1
init a 10_dog                                     | pairs found: 1
init a twice                                      | pairs found: 2
init a CAPITALS                                   | pairs found: 1
init a bare                                       | 1 row more without a caption, which no model trains on
init a long.csv                                   | 1 of the first 1 captions have more than 1,000 characters
init a tiny                                       | 1 of the first 1 images are below 64 px, too small to train on
init a windows.csv                                | 1 of the first 1 images cannot be opened ~: missing_file
init a cells.csv                                  | 1 of the first 1 images cannot be opened ~: unsupported_reference
plan mine.yaml store=/proc/self                   | warning: ~the store /proc/self: files cannot be stored there
"""


def rows_of(table: str) -> list[list[str]]:
    return [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]


ROWS, DONE = rows_of(TABLE), rows_of(TAKEN)


def refuses(calls: Mapping[Callable[[], object], str], kind: type[Exception] = unclip.UserError) -> None:
    """Each call must end with a line that has its words."""
    for call, words in calls.items():
        with pytest.raises(kind, match=words) as refused:
            call()
        assert "\n" not in str(refused.value)
