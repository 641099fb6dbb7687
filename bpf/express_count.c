/* Where ioctl(FIONREAD) knows nothing of redirected bytes (the agent's probe says so; seen on 6.1), it is told the rest here,
 * on its way out of the kernel. Readers go by it: nginx takes 0 for "nothing left" and waits for ever. Loaded apart
 * (nodeagent/express_count.py), and only there. */

#define FIONREAD 0x541B
#define MESSAGES_MAX 512 /* counted; whoever reads by it asks again */

static long (*write_user)(void *dst, const void *src, u32 size) = (void *)36;
static long (*read_user)(void *dst, u32 size, const void *src) = (void *)112;
static long (*read_kernel)(void *dst, u32 size, const void *src) = (void *)113;

/* At the end of int tcp_ioctl(struct sock *, int command, unsigned long place). Where `place` is the kernel's own (from 6.5
 * on), writing there as a user fails, and nothing is changed. */
int TELL(u64 *arguments)
{
  void *sk = (void *)arguments[0], *place = (void *)arguments[2];
  u64 psock = 0, ready = 0, next = 0, head;
  u32 size, count = 0, ordinary = 0;

  if ((u32)arguments[1] != FIONREAD || (u32)arguments[3])
    return 0;
  if (!xends.sk_storage_get(sk, 0, 0))
    return 0;
  read_kernel(&psock, 8, sk + O_USER_DATA);
  psock &= ~7ull;
  if (!psock)
    return 0;
  head = psock + O_INGRESS_MSG;
  read_kernel(&next, 8, (void *)head);
#pragma clang loop unroll(disable)
  for (int i = 0; i < MESSAGES_MAX; i++) {
    if (next == head || read_kernel(&size, 4, (void *)(next - O_MSG_LIST + O_MSG_SIZE)))
      break;
    count += size;
    if (read_kernel(&next, 8, (void *)next))
      break;
  }
  /* Until the socket is settled TCP's own bytes are in TCP's own queue, which was counted; afterwards in this one */
  read_kernel(&ready, 8, (void *)(psock + O_SAVED_READY));
  if (!ready)
    read_user(&ordinary, 4, place);
  count += ordinary;
  write_user(place, &count, 4);
  return 0;
}
