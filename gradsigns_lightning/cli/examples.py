"""Three examples of each command, as its help shows them; a test composes the configuration of every one."""

EXAMPLES = {
    "keygen": (
        'owner="Acme Vision" data=fashion_mnist key=b128 target_class=0 out=acme.gskey',
        'owner="Acme Vision" data=digits key=b32 scope="digits v2" out=digits.gskey',
        "master=acme.gskey customer=4321 out=customer.gskey",
    ),
    "train": (
        "experiment=demo twin=true",
        "data=fashion_mnist model=small_resnet key=acme.gskey trainer.max_epochs=6",
        "-m experiment=demo watermark.strength=0.5,1,2 seed=0,1",
    ),
    "verify": (
        "checkpoint=model.ckpt key=acme.gskey",
        "onnx=suspect.onnx key=acme.gskey images=folder_of_images",
        "endpoint=https://host/v2/models/NAME key=acme.gskey images=folder_of_images "
        "api.journal=answers.jsonl",
    ),
    "trace": (
        "checkpoint=leaked.ckpt key=master.gskey",
        "checkpoint=leaked.ckpt key=master.gskey images=folder_of_images n_customers=500",
        "onnx=leaked.onnx key=master.gskey images=folder_of_images api.max_queries=2000",
    ),
    "commit": (
        "key=acme.gskey",
        "key=[acme.gskey,other.gskey] out=models.commitment.json",
        "key=acme.gskey attach=reply.tsr authority=authority.pem",
    ),
    "judge": (
        "bundle=acme.gsbundle checkpoint=suspect.ckpt images=my_images",
        "bundle=acme.gsbundle endpoint=https://host/v2/models/NAME images=my_images controls=[other.onnx]",
        "bundle=acme.gsbundle onnx=suspect.onnx images=my_images authority=authority.pem "
        "suspect_since=2026-11-23T00:00:00+00:00",
    ),
    "strip": (
        "checkpoint=model.ckpt out=release.ckpt",
        "checkpoint=epoch=9-step=990.ckpt out=release.ckpt overwrite=true",
        "checkpoint=model.ckpt out=release.ckpt json=removed.json",
    ),
    "attack": (
        "checkpoint=model.ckpt key=acme.gskey attack=ftal",
        "checkpoint=model.ckpt key=acme.gskey attack=ftal attack.rate_factor=3 json=ftal.json",
        "-m checkpoint=model.ckpt key=acme.gskey attack=ftal,ftll,rtal,rtll",
    ),
    "benchmark": (
        "experiment=demo attack=rtal",
        "-m experiment=demo attack=ftal,ftll,rtal,rtll seed=0,1,2",
        "-m experiment=fashion_mnist scheme=gradsigns,uchida attack=ftal,prune_90 hydra/launcher=joblib",
    ),
    "report": (
        "out=survival.md",
        "folder=outputs/benchmark out=docs/survival.md",
        "folder=outputs/benchmark out=survival.md json=files.json",
    ),
    "import-2021": (
        "folder=64-bit_CIFAR10 images=folder_of_images",
        "folder=64-bit_CIFAR10 images=folder_of_images mean_image=mean.npy",
        "folder=64-bit_CIFAR10 images=folder_of_images api.max_queries=384 json=result.json",
    ),
}
