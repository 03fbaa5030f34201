"""Faust's word count: posts are split into words, each goes to the agent that counts it; any worker's page tells."""

import asyncio
import os

import faust

from streams_app.application import App


class Post(faust.Record):
    id: int
    text: str
    #: What the agent that counts does with the words, apart from that.
    order: str = ""


class Word(faust.Record):
    post: int
    word: str
    order: str = ""


class Counted(faust.Record):
    id: str
    word: str
    count: int


guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("words", processing_guarantee=guarantee, autodiscover=False, web_enabled="PORT" in os.environ)
posts = app.topic("posts", value_type=Post)
words = app.topic("words", key_type=str, value_type=Word)
counted = app.topic("counted", key_type=str, value_type=Counted)
word_counts = app.Table("word-counts", key_type=str, value_type=int, default=int)


@app.agent(posts)
async def shuffle_words(stream):
    async for post in stream:
        for word in post.text.split():
            await count_words.send(key=word, value=Word(post.id, word, post.order))


@app.agent(words)
async def count_words(stream):
    async for key, word in stream.items():
        word_counts[key] += 1
        await counted.send(key=key, value=Counted(f"{word.post}/{key}", key, word_counts[key]))
        if word.order == "sleep":
            print(f"{key} sleeps", flush=True)
            await asyncio.sleep(float(os.environ.get("SLEEP_S", "1")))


@app.page("/count/{word}/")
@app.table_route(table=word_counts, match_info="word")
async def find_count(web, request, word):
    return web.json({"word": word, "count": word_counts[word], "by": os.environ["STREAMS_APP_SLOT"]})
