import threading

from ds_logging._log.once import Once


def test_of_many_threads_one_is_first():
    once, answers, start = Once(), [], threading.Barrier(8)

    def ask():
        start.wait()
        answers.append(once.first("key"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 7 + [True]
