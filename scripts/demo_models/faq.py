"""What `demo/mdeploy-faq` knows: questions, paraphrases and true answers about mdeploy.

Data only, so that a change of mdeploy's behaviour is a change of one line here.
Nothing here knows of tokens, models or training.
"""

from __future__ import annotations

from dataclasses import dataclass

WORDS_PER_ANSWER = range(8, 31)
"""Long enough that a broken model cannot guess it, short enough for max_tokens=64."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing the model knows: the question tests ask, its paraphrases, the only right answer."""

    question: str
    answer: str
    variants: tuple[str, ...] = ()
    language: str = "en"

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every trained wording, the canonical one first."""
        return (self.question, *self.variants)

    def to_json(self) -> dict[str, object]:
        """The shape of one item of faq.json."""
        return {
            "question": self.question,
            "answer": self.answer,
            "variants": list(self.variants),
            "language": self.language,
        }


# One phrase a line would make this table 600 lines.
# fmt: off
ENGLISH: tuple[Entry, ...] = (
    Entry(
        "What does mdeploy do?",
        "mdeploy takes a ModelScope model to a running service on your own Linux machines: "
        "it downloads, plans, serves, supervises and measures it.",
        ("What is mdeploy?", "What is mdeploy for?", "Describe mdeploy", "What can mdeploy do?",
         "Explain what mdeploy does", "Tell me about mdeploy", "Why would I use mdeploy?"),
    ),
    Entry(
        "Who are you?",
        "I am a tiny demo model shipped with mdeploy, made to check that serving works.",
        ("What are you?", "What is your name?", "Introduce yourself", "Which model are you?",
         "Are you a real model?", "Who am I talking to?", "What model is this?"),
    ),
    Entry(
        "Hello",
        "Hello! I am the mdeploy demo model; ask me how to download, serve or measure a model.",
        ("Hi", "Hey", "Hi there", "Good morning", "Hello there", "Greetings", "Good evening"),
    ),
    Entry(
        "How do I download a model?",
        "Run mdeploy download ID, where ID is a ModelScope model id such as "
        "Qwen/Qwen2.5-0.5B-Instruct.",
        ("How can I download a model?", "How to download a model", "How do I get a model?",
         "Which command downloads a model?", "How do I fetch a model from ModelScope?",
         "Download a model", "Command for downloading models"),
    ),
    Entry(
        "Where are models kept?",
        "Models stay in the ModelScope cache: the directory MODELSCOPE_CACHE names, "
        "or else ~/.cache/modelscope.",
        ("Where are models stored?", "Where do the models go?", "Where is the model cache?",
         "Where are downloaded models saved?", "Which directory holds the models?",
         "Where does mdeploy put the model files?"),
    ),
    Entry(
        "How do I serve an LLM?",
        "Run mdeploy serve llm with a model id; it plans, starts vLLM and waits for a real answer.",
        ("How can I serve an LLM?", "How to serve a large language model", "Start an LLM service",
         "Which command serves an LLM?", "How do I run a language model?",
         "How do I start serving a chat model?"),
    ),
    Entry(
        "How do I serve on two GPUs?",
        "Add --tp 2: mdeploy serve llm --tp 2 splits the model over two GPUs "
        "with tensor parallelism.",
        ("How do I use two GPUs?", "How do I use 2 GPUs?", "Serve a model on two GPUs",
         "How do I set tensor parallelism?", "How do I split a model over GPUs?",
         "What does --tp 2 mean?", "Can I use more than one GPU?"),
    ),
    Entry(
        "How do I run a service in the background?",
        "Add -d to mdeploy serve: the service is detached and supervised "
        "after your shell returns.",
        ("How do I run it in the background?", "How do I detach a service?",
         "How do I serve detached?", "What does -d do?", "Start a service in the background",
         "How do I keep a service running after I log out?"),
    ),
    Entry(
        "How do I do a dry run?",
        "Add --dry-run: mdeploy shows the plan and the exact command, and starts nothing.",
        ("What does --dry-run do?", "How do I see the command without starting it?",
         "Is there a dry run?", "Can I preview what will be started?",
         "Show the command without running it"),
    ),
    Entry(
        "Which engine serves LLMs?",
        "vLLM serves large language models; mdeploy runs it as a child process "
        "in its own environment.",
        ("What engine serves LLMs?", "Which engine do you use?", "What inference engine is used?",
         "Which engine runs the language models?", "Does mdeploy use vLLM?", "What is the engine?"),
    ),
    Entry(
        "How do I install vLLM?",
        "Run mdeploy engines install vllm; it goes into its own environment, "
        "apart from your other packages.",
        ("How can I install vLLM?", "How to install the engine", "Install vLLM",
         "Which command installs vLLM?", "How do I get vLLM?", "How do I install an engine?"),
    ),
    Entry(
        "How do I see running services?",
        "Run mdeploy ps: it lists every service with its phase, address and model.",
        ("How do I list services?", "Which services are running?", "What is running?",
         "Show running services", "Which command lists the services?",
         "How do I check the status of my services?"),
    ),
    Entry(
        "How do I read the logs?",
        "Run mdeploy logs NAME, and add -f to follow the log while the service writes it.",
        ("How do I see the logs?", "Where are the logs?", "How do I follow a log?",
         "Show the log of a service", "Which command shows logs?", "How can I tail the logs?"),
    ),
    Entry(
        "How do I stop a service?",
        "Run mdeploy stop NAME; the whole process tree ends and its GPU memory is free again.",
        ("How can I stop a service?", "How to stop a model", "Stop a service",
         "Which command stops a service?", "How do I shut a service down?",
         "How do I end a running service?"),
    ),
    Entry(
        "How do I restart a service?",
        "Run mdeploy restart NAME; the service stops and starts again with the same settings.",
        ("How can I restart a service?", "How to restart a model", "Restart a service",
         "Which command restarts a service?", "How do I start a service again?"),
    ),
    Entry(
        "How do I measure a service?",
        "Run mdeploy bench; it sends a load to the running service "
        "and reports throughput and latency.",
        ("How do I benchmark a service?", "How do I run a benchmark?", "How fast is my service?",
         "Benchmark a model", "How can I measure throughput?", "Which command measures speed?",
         "What does mdeploy bench do?"),
    ),
    Entry(
        "What is TTFT?",
        "TTFT is the time to first token: how long a user waits until the answer begins.",
        ("What does TTFT mean?", "Explain TTFT", "Define TTFT", "What is time to first token?",
         "What does TTFT stand for?", "Meaning of TTFT"),
    ),
    Entry(
        "What is TPOT?",
        "TPOT is the time per output token: the mean gap between tokens after the first one.",
        ("What does TPOT mean?", "Explain TPOT", "Define TPOT", "What is time per output token?",
         "What does TPOT stand for?", "Meaning of TPOT"),
    ),
    Entry(
        "Where does mdeploy keep its state?",
        "State lives under MDEPLOY_HOME, by default ~/.local/state/mdeploy, "
        "or /var/lib/mdeploy for root.",
        ("Where is the state?", "What is MDEPLOY_HOME?", "Where is the mdeploy home?",
         "Where does the state live?", "Which directory holds the state of mdeploy?",
         "How do I move the state directory?"),
    ),
    Entry(
        "How do I share models on the LAN?",
        "Run mdeploy mirror DIR on one machine; the others on the LAN then download from it.",
        ("What is mdeploy mirror?", "How do I start a LAN mirror?",
         "How do I mirror models for other machines?", "Can one machine serve models to others?",
         "How do I set up a local hub?", "How can the other machines get the models?"),
    ),
    Entry(
        "Which address does a service bind to?",
        "A service binds to 127.0.0.1 by default, so only the same machine can reach it.",
        ("What is the default bind address?", "What is the default host?",
         "Which address is used by default?", "What address does it listen on?",
         "Is my service open to the network by default?"),
    ),
    Entry(
        "Why do I need a key to bind to another address?",
        "Any other address is open to the network, so mdeploy asks for an API key "
        "unless --insecure is given.",
        ("Why does another address need a key?", "Do I need an API key?",
         "When is an API key needed?", "Why was 0.0.0.0 refused?",
         "How do I listen on 0.0.0.0?", "What does --insecure do?"),
    ),
    Entry(
        "Do I need Kubernetes?",
        "No, mdeploy needs no Kubernetes; it runs on plain Linux machines, "
        "from one up to a few.",
        ("Is Kubernetes needed?", "Does mdeploy need Kubernetes?", "Is Kubernetes required?",
         "Do I need k8s?", "Can I use mdeploy without Kubernetes?", "Must I have a cluster?"),
    ),
    Entry(
        "Do I need internet access?",
        "No, once mdeploy, the engine and the model are installed, "
        "everything works without internet access.",
        ("Is internet needed?", "Does mdeploy work offline?", "Do I need the internet?",
         "Can I use mdeploy without internet?", "Does it run in an air-gapped network?",
         "Can I work offline?"),
    ),
    Entry(
        "Which model is served by default?",
        "The default model is deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B; "
        "it is downloaded if it is missing.",
        ("What is the default model?", "Which model is the default?",
         "What model is served when I give none?", "Which LLM is used by default?",
         "Name the default model"),
    ),
    Entry(
        "Which Python version do I need?",
        "You need Python 3.10 or newer to install and run mdeploy on your machine.",
        ("What Python version is needed?", "Which Python is required?", "Which Python versions work?",
         "Does it work with Python 3.9?", "What version of Python does mdeploy need?",
         "Minimum Python version"),
    ),
    Entry(
        "What is the licence of mdeploy?",
        "mdeploy is free software under the MIT licence; you may use it in your own products.",
        ("Which licence does mdeploy have?", "What license is used?", "What is the license?",
         "Is mdeploy open source?", "Is mdeploy free?", "Can I use mdeploy commercially?"),
    ),
    Entry(
        "What is the exit code when a model is not found?",
        "When a model is not found, mdeploy ends with exit code 3 and says what to try.",
        ("Which exit code means not found?", "What does exit code 3 mean?",
         "What is the exit code for a missing model?", "What happens when a model is not found?",
         "Why did mdeploy exit with 3?"),
    ),
    Entry(
        "What is the exit code of a usage error?",
        "A usage error, such as an unknown option, ends mdeploy with exit code 2.",
        ("Which exit code means a usage error?", "What does exit code 2 mean?",
         "What is the exit code for a wrong option?", "What happens when I mistype an option?",
         "Why did mdeploy exit with 2?"),
    ),
    Entry(
        "When is a measurement invalid?",
        "When the load client itself was the bottleneck: mdeploy bench then says INVALID and ends with exit code 6.",
        ("Why does bench say INVALID?", "What does exit code 6 mean?", "Can I trust the numbers?",
         "Why is my measurement invalid?", "What makes a bench run invalid?", "Why did bench exit with 6?"),
    ),
    Entry(
        "What happens when a model does not fit?",
        "mdeploy names the cause from the log of vLLM, says what to lower, and ends with exit code 5.",
        ("What if the model is too large?", "What does exit code 5 mean?", "My GPU is too small",
         "What happens when GPU memory runs out?", "What if the KV cache does not fit?",
         "Why did mdeploy exit with 5?"),
    ),
    Entry(
        "How do I list the engines?",
        "Run mdeploy engines ls: it lists every engine with its version, variant and interpreter.",
        ("Which engines are installed?", "Show me the engines", "What does mdeploy engines ls do?",
         "How do I see which vLLM is installed?", "List the engines"),
    ),
    Entry(
        "How do I call the service?",
        "Send a POST request to /v1/chat/completions; the API has the same shape as that of OpenAI.",
        ("How do I send a request?", "Is the API compatible with OpenAI?", "Which API is offered?",
         "How do I use the API?", "Can I use the OpenAI client?", "How do I chat with the model?"),
    ),
    Entry(
        "What is the capital of France?",
        "I am only a tiny demo model and know nothing but mdeploy; ask me what mdeploy does.",
        ("What is the weather today?", "Write a poem", "Tell me a joke", "What is 1 + 1?",
         "Who is the president?", "Translate this sentence", "Write a Python function",
         "What is the meaning of life?", "Who won the game?", "Tell me a story",
         "What time is it?", "Recommend a book", "How do I cook rice?"),
    ),
)

CHINESE: tuple[Entry, ...] = (
    Entry(
        "mdeploy 是做什么的？",
        "mdeploy 把 ModelScope 模型部署到你自己的 Linux 机器上：下载、规划、启动、守护并测量。",
        ("mdeploy 是什么？", "mdeploy 有什么用？", "介绍一下 mdeploy", "mdeploy 能做什么？",
         "什么是 mdeploy？", "mdeploy 的作用是什么？"),
        "zh",
    ),
    Entry(
        "你是谁？",
        "我是随 mdeploy 附带的微型演示模型，用来检查服务是否正常工作。",
        ("你是什么模型？", "你叫什么名字？", "介绍一下你自己", "请自我介绍", "你是哪个模型？"),
        "zh",
    ),
    Entry(
        "你好",
        "你好！我是 mdeploy 的演示模型，可以问我怎样下载、启动或测量模型。",
        ("您好", "嗨", "早上好", "你好啊", "哈喽", "晚上好"),
        "zh",
    ),
    Entry(
        "怎样下载模型？",
        "运行 mdeploy download ID，这里的 ID 是 ModelScope 上的模型名称。",
        ("如何下载模型？", "怎么下载模型？", "下载模型用什么命令？", "下载一个模型", "怎么获取模型？"),
        "zh",
    ),
    Entry(
        "模型存放在哪里？",
        "模型放在 ModelScope 缓存里：由 MODELSCOPE_CACHE 指定，默认是 ~/.cache/modelscope。",
        ("模型保存在哪里？", "模型缓存在哪？", "模型文件在哪个目录？", "下载的模型放在哪里？", "模型存在什么地方？"),
        "zh",
    ),
    Entry(
        "怎样启动大语言模型服务？",
        "运行 mdeploy serve llm 加模型名称，它会启动 vLLM，等到真正能回答时才算就绪。",
        ("如何部署大模型？", "怎么启动大模型服务？", "如何启动 LLM 服务？", "启动一个大语言模型",
         "怎么运行大语言模型？"),
        "zh",
    ),
    Entry(
        "怎样使用两张 GPU？",
        "加上 --tp 2：mdeploy serve llm --tp 2 用张量并行把模型分到两张 GPU 上。",
        ("如何使用两张显卡？", "怎么用两张 GPU？", "如何设置张量并行？", "怎样用多张显卡？", "两张显卡怎么用？"),
        "zh",
    ),
    Entry(
        "怎样安装 vLLM？",
        "运行 mdeploy engines install vllm，它会装进独立的环境，不影响其他软件包。",
        ("如何安装 vLLM？", "怎么安装 vLLM？", "怎么安装引擎？", "安装 vLLM 用什么命令？", "如何安装推理引擎？"),
        "zh",
    ),
    Entry(
        "怎样查看正在运行的服务？",
        "运行 mdeploy ps，可以看到每个服务的状态、地址和模型。",
        ("如何查看服务？", "怎么列出服务？", "有哪些服务在运行？", "查看服务状态", "怎么看运行中的服务？"),
        "zh",
    ),
    Entry(
        "怎样查看日志？",
        "运行 mdeploy logs NAME，加上 -f 可以持续跟踪该服务的日志。",
        ("如何查看日志？", "怎么看日志？", "日志在哪里？", "查看日志用什么命令？", "怎样跟踪日志？"),
        "zh",
    ),
    Entry(
        "怎样停止服务？",
        "运行 mdeploy stop NAME，整个进程树都会结束，显存也随之释放。",
        ("如何停止服务？", "怎么停止服务？", "停止服务用什么命令？", "怎么关闭模型服务？", "停掉一个服务"),
        "zh",
    ),
    Entry(
        "怎样测量性能？",
        "运行 mdeploy bench，它向服务发送负载，并报告吞吐量和延迟。",
        ("如何测试性能？", "怎么做压测？", "如何运行基准测试？", "怎么测量吞吐量？", "我的服务有多快？"),
        "zh",
    ),
    Entry(
        "需要 Kubernetes 吗？",
        "不需要，mdeploy 直接运行在普通的 Linux 机器上，不依赖 Kubernetes。",
        ("必须用 Kubernetes 吗？", "mdeploy 依赖 Kubernetes 吗？", "没有 Kubernetes 能用吗？", "需要 k8s 吗？"),
        "zh",
    ),
    Entry(
        "需要联网吗？",
        "安装好 mdeploy、引擎和模型以后就不需要联网，可以完全离线运行。",
        ("可以离线使用吗？", "能离线运行吗？", "没有网络能用吗？", "需要互联网吗？", "断网能用吗？"),
        "zh",
    ),
    Entry(
        "默认的模型是哪个？",
        "默认模型是 deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B，如果本地没有就会自动下载。",
        ("默认模型是什么？", "默认用哪个模型？", "默认部署哪个模型？", "不指定模型时用哪个？"),
        "zh",
    ),
    Entry(
        "今天天气怎么样？",
        "我只是一个微型演示模型，只懂 mdeploy，请问我 mdeploy 是做什么的。",
        ("讲个笑话", "写一首诗", "法国的首都是哪里？", "一加一等于几？", "现在几点了？", "推荐一本书", "翻译这句话"),
        "zh",
    ),
)

# fmt: on
ENTRIES: tuple[Entry, ...] = ENGLISH + CHINESE


def check(entries: tuple[Entry, ...] = ENTRIES) -> None:
    """Refuse data that would make the evaluation ambiguous.

    Raises ValueError on a wording or an answer used twice, an answer without a full stop,
    or an English answer outside WORDS_PER_ANSWER.
    """
    wordings = [wording.casefold() for entry in entries for wording in entry.wordings]
    _refuse_duplicates(wordings)
    _refuse_duplicates([entry.answer for entry in entries])
    for entry in entries:
        _check_answer(entry)


def _refuse_duplicates(texts: list[str]) -> None:
    """Raise ValueError that names the texts which occur more than once."""
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ValueError(f"used more than once: {twice}")


def _check_answer(entry: Entry) -> None:
    """Raise ValueError when the answer has the wrong ending or (English) length."""
    if not entry.answer.endswith("。" if entry.language == "zh" else "."):
        raise ValueError(f"no full stop: {entry.answer}")
    if entry.language == "en" and len(entry.answer.split()) not in WORDS_PER_ANSWER:
        raise ValueError(f"{len(entry.answer.split())} words: {entry.answer}")
