from datetime import datetime

import pytest

from sinkjax.text import chat
from sinkjax.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
USER = {"role": "user", "content": "hello"}


def test_renderings_are_those_of_transformers(reference):
    for case in reference["chats"]:
        text = chat.render(
            reference["templates"][case["template"]],
            case["messages"],
            add_generation_prompt=case["add_generation_prompt"],
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
        )
        assert text == case["text"]


def test_the_tokenizer_gives_the_template_its_tokens(smollm2, reference):
    case = next(case for case in reference["chats"] if case["template"] == "headers")
    smollm2 = Tokenizer(
        smollm2._backend,
        bos_id=smollm2.bos_id,
        eos_ids=smollm2.eos_ids,
        chat_template=reference["templates"]["headers"],
    )
    assert smollm2.apply_chat(case["messages"], add_generation_prompt=False) == case["text"]


def test_no_template(byte_level_metadata):
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.from_gguf(byte_level_metadata).apply_chat([USER])


def test_a_template_that_refuses():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refused the messages: roles must alternate"):
        chat.render(template, [USER])


def test_a_template_that_is_broken():
    with pytest.raises(ValueError, match="line 2: .*endfor"):
        chat.render("\n{% for m in messages %}", [USER])


@pytest.mark.parametrize("message", ["hello", {"content": "hello"}])
def test_a_message_that_is_none(message):
    with pytest.raises(ValueError, match="message 1 is .*'role': 'user'"):
        chat.render(CHATML, [USER, message])


def test_a_template_runs_in_a_sandbox():
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="refused"):
            chat.render(source, [USER])


def test_strftime_now():
    assert chat.render("{{ strftime_now('%Y') }}", [USER]) in {
        str(datetime.now().year),
        str(datetime.now().year - 1),  # at midnight
    }


def test_messages_stay_as_they_are():
    messages = [dict(USER)]
    chat.render(CHATML, messages)
    assert messages == [USER]


# The next turn


def turns(reply: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": reply}, {"role": "user", "content": "go on"}]


def test_next_turn_is_what_was_not_seen():
    seen = chat.render(CHATML, [USER]) + "Hi."
    new = chat.next_turn(CHATML, turns("Hi."), seen=seen)
    assert new == "<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    assert seen + new == chat.render(CHATML, turns("Hi."))
    after = chat.next_turn(CHATML, turns("Hi."), seen=seen + "<|im_end|>")
    assert new == "<|im_end|>" + after


def test_the_first_turn_has_seen_nothing():
    assert chat.next_turn(CHATML, [USER], seen="") == chat.render(CHATML, [USER])


@pytest.mark.parametrize("reply", ["Hi. \n", " Hi."])
def test_next_turn_raises_where_the_template_rewrites_a_reply(reply):
    seen = chat.render(TRIMMING, [USER]) + reply
    with pytest.raises(ValueError, match="otherwise than they were seen: at character"):
        chat.next_turn(TRIMMING, turns(reply), seen=seen)
    assert chat.next_turn(CHATML, turns(reply), seen=seen)


def test_next_turn_raises_where_the_conversation_is_shorter_than_what_was_seen():
    seen = chat.render(CHATML, turns("Hi.")) + "Well,"
    with pytest.raises(ValueError, match="at character .* seen was 'Well,'"):
        chat.next_turn(CHATML, turns("Hi."), seen=seen)


@pytest.mark.parametrize("reply", ["Hi.", " Hi \n", "", "日本 👍", "hell"])
def test_ids_of_a_next_turn_are_those_of_the_whole(smollm2, reply):
    messages = turns(reply)
    seen = smollm2.apply_chat(messages[:1]) + reply
    ids = smollm2.next_turn(messages, seen=seen)
    whole = smollm2.apply_chat(messages)
    assert smollm2.encode(seen) + ids == smollm2.encode(whole)
    assert ids[0] == smollm2.eos_ids[0]


def test_ids_of_a_next_turn_where_the_text_alone_would_give_others(sentencepiece):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer = Tokenizer(sentencepiece._backend, chat_template=template)
    messages = turns("the cat")
    seen = tokenizer.apply_chat(messages[:1], add_generation_prompt=False)
    ids = tokenizer.next_turn(messages, seen=seen)
    whole = tokenizer.apply_chat(messages)
    assert tokenizer.encode(seen) + ids == tokenizer.encode(whole)
    assert ids != tokenizer.encode(whole[len(seen) :])  # which begins with another space


def test_next_turn_raises_where_tokens_grow_together(byte_level):
    tokenizer = Tokenizer(byte_level._backend, chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="'o', after 'hell', changes the tokens before it"):
        tokenizer.next_turn([USER], seen="hell")
