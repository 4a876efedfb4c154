"""Average the weights of several checkpoints into one network (a model soup), written as safetensors."""

from czii25d.pipeline.app import run
from czii25d.pipeline.soup import make_soup

if __name__ == "__main__":
    run(make_soup, "soup")
