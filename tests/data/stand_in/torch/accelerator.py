def set_device_index(device: int) -> None:
    from torch import cuda

    cuda._from_cpp()
    cuda._device = device
