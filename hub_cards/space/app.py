"""A Hugging Face Space: the page of `timm-hne app`. Its variable MODEL names another model than the packaged one."""
import os

from timm_hne.process import keep_freed_memory
from timm_hne.serving.classifier import Classifier
from timm_hne.serving.page import build, launch

model = os.environ.get('MODEL', 'hne_resnet50_c8')
page = build(Classifier.open(model, engine='eager'), model)

if __name__ == '__main__':
    keep_freed_memory()
    print(launch(page, host='0.0.0.0', port=int(os.environ.get('GRADIO_SERVER_PORT', 7860))), flush=True)
    page.block_thread()
