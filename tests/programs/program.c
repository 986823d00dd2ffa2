/* A program of many threads: `reach THREADS ADDRESS PORT` connects in each and succeeds if one
 * came through; `launch THREADS FILE ARGUMENT` has a thread that is not the first run the file. */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in peer = {.sin_family = AF_INET};
static atomic_int reached;

static void *reach(void *unused) {
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&peer, sizeof(peer)) == 0)
		reached++;
	if (fd >= 0)
		close(fd);
	return unused;
}

/* Nobody runs the file before all threads are there: running it ends them, and a thread that is to
 * be made meanwhile is not made. */
static pthread_barrier_t all;

static void *launch(void *line) {
	pthread_barrier_wait(&all);
	execv(((char **)line)[0], line);
	perror("execv");
	return NULL;
}

int main(int count, char **words) {
	pthread_t threads[64];
	int wanted = count == 5 ? atoi(words[2]) : 0;
	if (wanted < 1 || wanted > 64)
		return 2;
	int launches = strcmp(words[1], "launch") == 0;
	peer.sin_port = htons(atoi(words[4]));
	if (!launches && inet_pton(AF_INET, words[3], &peer.sin_addr) != 1)
		return 2;
	pthread_barrier_init(&all, NULL, wanted + 1);
	for (int i = 0; i < wanted; i++)
		if (pthread_create(&threads[i], NULL, launches ? launch : reach, words + 3))
			return 2;
	if (launches)
		pthread_barrier_wait(&all);
	for (int i = 0; i < wanted; i++)
		pthread_join(threads[i], NULL);
	return reached > 0 ? 0 : 1;
}
