"""What people tried who were new here: 167 mistakes and habits of other tools, each with what answers it.

A line has what was tried and, behind the bar, where its answer is tested: a command of the table of mistakes, or FILE::
and how the name of a test there begins. Those of - have no answer. What was tried is what a report of four first hours
names: of 124 command lines, 31 calls of Python and 12 requests. Where it only counts what was answered well, it is what
its findings name.
"""

import ast
import re
from functools import cache

from tests.chain import ROOT
from tests.jobs.mistakes import DONE, ROWS

LEAST = 160
COMMAND_LINE = """
-n | jobs/test_sample.py::test_several_images_of_a_caption
--count | sample cat --count 0
--num-images | sample cat --num-images 0
guidance_scale= | sample cat guidance_scale=much
seed= | sample cat seed=-1
--negative-prompt | sample cat --negative-prompt "an ugly dog"
inpaint | inpaint cat.gif
logs | logs mine.yaml
status | status mine.yaml
stop | stop mine.yaml
--output | run mine.yaml --output out2
--gpus | run mine.yaml --gpus 1
--resume | run mine.yaml --resume
--force | run mine.yaml --force
an empty caption | sample ""
sample -o cat.png | jobs/test_sample.py::test_several_images_of_a_caption
long captions: init | init a long.csv
long captions: doctor | jobs/test_plan.py::test_captions_that_curation_would_reject
long captions: plan | jobs/test_plan.py::test_captions_that_curation_would_reject
long captions: run | pipeline/data/test_captions.py::test_clip_learns_from_none_of_the_long_captions
paragraphs: init | pipeline/data/source/test_folders.py::test_a_paragraph_beside_an_image
paragraphs: what is read | pipeline/data/source/test_folders.py::test_a_paragraph_beside_an_image
a row a caption | pipeline/data/test_captions.py::test_a_list_with_a_row_for_each_caption_loses_none
a CSV without a header | plan mine.yaml source.paths=[rows.csv]
split TRAIN | plan mine.yaml source.paths=[TRAIN.csv]
split fold1 | plan mine.yaml source.paths=[fold1.csv]
hf:// | pipeline/data/source/test_hub.py::test_a_dataset_is_fetched_once_and_kept_to_its_commit
a name of the Hub | init hub OWNER/NAME
a single image as a list | init my cat.gif
sampling.size= | plan mine.yaml sampling.size=256
size= | plan mine.yaml size=256
epochs= | plan mine.yaml epochs=10
batch= | plan mine.yaml batch=12
device=0 | plan mine.yaml device=0
report after preset=nano | jobs/test_as_run.py::test_what_follows_a_run_with_overrides_is_that_runs
sample after preset=nano | jobs/test_as_run.py::test_bundles_after_a_run_with_overrides_are_that_runs
export after preset=nano | jobs/test_as_run.py::test_bundles_after_a_run_with_overrides_are_that_runs
another image under its name | pipeline/data/source/test_versions.py::test_a_file_that_is_replaced_is_fetched_again
a store that was moved | jobs/test_as_run.py::test_a_store_that_was_moved_is_missed
a private server: run | jobs/test_mistakes.py::test_all_rows_rejected_says_why
a private server, allowed later | pipeline/data/pairs/test_earlier.py::test_what_is_allowed_later
a private server: retry | jobs/test_data.py::test_what_is_forgotten_is_not_
data forget nosuch | jobs/test_data.py::test_mistakes
edit of a URL | edit vary https://h.test/a.png --from none
--to k8s | submit mine.yaml --to k8s
plan "" | plan ""
preset=small without a GPU | jobs/test_plan.py::test_what_a_gpu_does_in_minutes
a Ray that does not start | pipeline/graph/test_local_ray.py::test_a_ray_that_does_not_come_up
a list in Latin-1 | init my old.csv
a list in UTF-16 | init a utf16.csv
a list with semicolons | init a semicolons.csv
COCO's JSON | init a coco/annotations/captions_val2017.json
LLaVA's JSON | init a llava.json
kohya's JSON | init a kohya.json
Parquet of the Hub | init a hub.parquet
a list of another suffix | init my book.docx
train | train mine.yaml
help realese | help realese
a long caption to draw | jobs/test_sample.py::test_captions_and_seeds_are_checked_before_any_is_drawn
size=512 | jobs/test_python.py::test_names_of_other_programs_mean_the_same
edit -o strip.jpg | edit vary cat.gif --from none -o strip.jpg
edit -o way.gif | jobs/test_edit.py::test_a_folder_gets_single_images
no bundle | sample cat
prompts that cannot be read | pipeline/sampling/test_prompts.py::test_a_bad_row_of_a_csv_costs_itself
empty captions of a list | init a bare
images of 1x1 | init a tiny
captions that are numbers | init a numbers.csv
a.jpg and a.png | init a twice
.TXT | init a CAPITALS
a.jpg.txt | init my suffixes
captions in a second folder | init my apart
paths of Windows | init a windows.csv
two columns that may be meant | init my two.csv
base64 in cells | init a cells.csv
a pattern of files | init my tars/{00..10}.tar
a zip | init my pairs.zip
a project's name with a space | init "my project" list.csv
a configuration that exists | init mine list.csv
a full disk | jobs/test_mistakes.py::test_a_disk_that_is_full
store=/proc | plan mine.yaml store=/proc/self
store=/sys | jobs/test_mistakes.py::test_a_place_that_cannot_be_written
run.output=/proc | jobs/test_mistakes.py::test_a_place_that_cannot_be_written
run.output=/sys | jobs/test_mistakes.py::test_a_place_that_cannot_be_written
decoder.samples=many | plan mine.yaml decoder.samples=many
decoder.samles=100 | plan mine.yaml decoder.samles=100
decodr.samples=100 | plan mine.yaml decodr.samples=100
decoder.samples 100 | run mine.yaml decoder.samples 100
--decoder.samples=100 | run mine.yaml --decoder.samples=100
preset=hug | plan mine.yaml preset=hug
dropout=2 | plan mine.yaml decoder.model.dropout=2
decoder=3 | plan mine.yaml decoder=3
decoder.lr= | plan mine.yaml decoder.lr=1e-4
run.trackers=tensorboard | plan mine.yaml run.trackers=tensorboard
source.paths=list.csv | plan mine.yaml source.paths=list.csv
clip.weights=ViT-B-32 | plan mine.yaml clip.weights=ViT-B-32
run.decoder.device=gpu | plan mine.yaml run.decoder.device=gpu
s3:/ | plan mine.yaml store=s3:/bucket
gcs:// | plan mine.yaml store=gcs://bucket/a
comet | plan mine.yaml run.trackers=[comet]
images that were moved | plan mine.yaml source.paths=[moved]
a bundle that was moved | jobs/test_bundles.py::test_a_run_that_was_moved_draws_the_same
export to a folder that is not empty | export none --to photos
export to hf:// | export mine.yaml --to hf://me/model
a folder of diffusers | jobs/test_bundles.py::test_to_diffusers_and_back
rollback without a release before | release rollback mine.yaml
prompts that are gone | generate gone.txt --from none
a port in use | serve/test_app.py::test_a_port_in_use
port 80000 | serve --port 80000
host 0.0.0.0 without tokens | serve/test_guard.py::test_others_are_let_in_with_tokens_only
an SVG | edit vary drawing.svg --from none
a dead dashboard, http:// | submit mine.yaml --to http://127.0.0.1:9
a dead dashboard, host and port | submit mine.yaml --to 127.0.0.1:9
a dead dashboard, localhost | submit mine.yaml --to localhost:9
a dead dashboard, ray:// | submit mine.yaml --to ray://127.0.0.1:10001
KubeRay without credentials | cluster/test_submit.py::test_mistakes_cost_one_line_and_leave_nothing
show with a stage's name | show mine.yaml decoder
Ctrl-C in run | jobs/test_crashes.py::test_ctrl_c_during_pairs
Ctrl-C in sample | jobs/test_interrupt.py::test_ctrl_c_ends_what_is_stuck
Ctrl-C in init | jobs/test_interrupt.py::test_the_line_is_all_that_is_said
--gpus RTX4090 | plan mine.yaml --gpus RTX4090
--device mps | sample cat --device mps
a spreadsheet | pipeline/data/source/test_sheets.py::test_the_first_sheet_with_values_is_a_list
captions.txt with tabs | init a tabs.txt
gs:// | pipeline/store/test_cloud.py::test_a_write_whose_answer_is_lost_is_sent_again
"""
PYTHON = """
seed= | jobs/test_python.py::test_a_caption_becomes_an_image_and_a_list_becomes_a_list
steps= | jobs/test_python.py::test_names_of_other_programs_mean_the_same
guidance_scale= | jobs/test_python.py::test_names_of_other_programs_mean_the_same
num_images= | sample cat --num-images 0
num_images_per_prompt= | jobs/test_python.py::test_names_of_other_programs_mean_the_same
generator= | jobs/test_python.py::test_what_is_neither_caption_nor_image
generate(7) | jobs/test_python.py::test_what_is_neither_caption_nor_image
generate(None) | jobs/test_python.py::test_what_is_neither_caption_nor_image
an image as an array | jobs/test_python.py::test_an_image_is_given
an image as a tensor | jobs/test_python.py::test_what_is_neither_caption_nor_image
embed of captions and images | jobs/test_python.py::test_what_is_neither_caption_nor_image
train on a DataLoader | jobs/test_python_training.py::test_mistakes_in_training_are_one_line
seed=-1 | jobs/test_python.py::test_what_is_neither_caption_nor_image
embed("heart.png") | jobs/test_python.py::test_what_is_neither_caption_nor_image
train(epochs=) | jobs/test_python_training.py::test_mistakes_in_training_are_one_line
load of a name of the Hub | jobs/test_python.py::test_what_is_neither_caption_nor_image
num_inference_steps= | jobs/test_python.py::test_names_of_other_programs_mean_the_same
negative_prompt= | jobs/test_python.py::test_what_is_neither_caption_nor_image
width= | jobs/test_python.py::test_what_is_neither_caption_nor_image
height= | jobs/test_python.py::test_what_is_neither_caption_nor_image
sise= | jobs/test_python.py::test_what_is_neither_caption_nor_image
train(lr=) | jobs/test_python_training.py::test_mistakes_in_training_are_one_line
train on a Dataset | jobs/test_python_training.py::test_a_dataset_trains_as_its_columns_do
train on a generator | jobs/test_python_training.py::test_mistakes_in_training_are_one_line
train with validation, callback, checkpoint | jobs/test_python_training.py::test_a_training_is_validated
open(preset=) | jobs/test_python.py::test_values_open_as_their_file_does
Project.config | jobs/test_python.py::test_values_open_as_their_file_does
pairs("trian") | jobs/test_python.py::test_pairs_are_read_in_many_ways
pairs[0] | jobs/test_python.py::test_pairs_are_read_in_many_ways
pairs.to_hf() | jobs/test_python.py::test_pairs_are_read_in_many_ways
a DataLoader of pairs | jobs/test_python.py::test_pairs_are_read_in_many_ways
"""
HTTP = """
negative_prompt | serve/test_api.py::test_fields_of_other_servers
guidance_scale | serve/test_api.py::test_fields_of_other_servers
chat/completions | serve/test_api.py::test_a_body_or_path_that_is_none
responses | serve/test_api.py::test_a_body_or_path_that_is_none
model="dall-e-3" | serve/test_api.py::test_the_model_is_listed
model="gpt-image-1" | serve/test_api.py::test_the_model_is_listed
quality="hd" | serve/test_clients.py::test_every_value_of_the_clients_types
output_format="webp" | serve/test_api.py::test_a_url_holds_the_image_that_base64_would
style | serve/test_clients.py::test_every_value_of_the_clients_types
1792x1024 | serve/test_clients.py::test_every_value_of_the_clients_types
an edit without a mask | serve/test_clients.py::test_every_value_of_the_clients_types
a black and white mask | serve/test_clients.py::test_every_value_of_the_clients_types
"""
PLACES = {"command line": (COMMAND_LINE, 124), "Python": (PYTHON, 31), "HTTP": (HTTP, 12)}  # as many as were tried
TRIED = {
    f"{place}: {what}": answer
    for place, (text, _) in PLACES.items()
    for what, answer in (re.split(r" +\| +", line) for line in text.strip().splitlines())
}
COMMANDS = {words for words, _ in (*ROWS, *DONE)}


@cache
def names_of(file: str) -> set[str]:
    path = ROOT / "tests" / file
    nodes = ast.parse(path.read_text()).body if path.is_file() else []
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def answered(answer: str) -> bool:
    file, colons, test = answer.partition("::")
    return sum(name.startswith(test) for name in names_of(file)) == 1 if colons else answer in COMMANDS


def test_every_one_that_was_tried_is_listed_once() -> None:
    for text, tried in PLACES.values():
        assert len(text.strip().splitlines()) == tried
    assert len(TRIED) == sum(tried for _, tried in PLACES.values())


def test_of_all_that_was_tried_nearly_all_is_answered_by_a_test_that_is_there() -> None:
    without = {what for what, answer in TRIED.items() if not answered(answer)}
    assert without == {what for what, answer in TRIED.items() if answer == "-"}, "no such command or test"
    assert len(TRIED) - len(without) >= LEAST
