import pytest


@pytest.fixture
def content():
    """A json of three images with objects of all kinds: usable, partly outside, a crowd, and one outside its image."""
    return {
        "images": [
            {"id": 30, "file_name": "c.png", "height": 20, "width": 40},
            {"id": 10, "file_name": "a.png", "height": 40, "width": 20},
            {"id": 20, "file_name": "b.png", "height": 20, "width": 20},
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 9, "bbox": [2, 4, 6, 8], "area": 40, "iscrowd": 0},
            {"id": 2, "image_id": 30, "category_id": 2, "bbox": [-5, 10, 15.5, 20], "iscrowd": 0},
            {"id": 3, "image_id": 30, "category_id": 9, "bbox": [0, 0, 5, 5], "area": 20, "iscrowd": 1},
            {"id": 4, "image_id": 20, "category_id": 9, "bbox": [20, 0, 5, 5], "area": 20, "iscrowd": 0},
            {"id": 5, "image_id": 10, "category_id": 2, "bbox": [0, 0, 20, 40]},
        ],
    }
