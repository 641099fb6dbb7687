/* express(): runs for what an enrolled application's socket sends, under that socket's lock. Carries complete requests to
 * the server's socket and bounded responses back; whatever it is not sure of takes the ordinary way (SK_PASS).
 *
 * The latch is arithmetic: bytes on the ordinary way move TCP's sequence numbers, redirected ones do not. So every condition
 * below that compares one fails by itself after any SK_PASS, until the proxy has read all of it and arms again.
 *
 * A message goes one way as a whole. bpf_msg_apply_bytes would let it be split, but the kernel keeps the redirection for
 * the rest of the same message, whatever the program says about that (seen on 6.18: msg->sk_redir is never cleared). */

int express(struct sk_msg_md *m)
{
  struct bpf_sock *sk = m->sk; /* read once: each read is a new maybe-null to the verifier */
  struct pl_xrecord *r;
  struct pl_xend *e;
  void *tp;
  u32 slot;

  if (!sk)
    return SK_PASS;
  e = xends.sk_storage_get(sk, 0, 0);
  if (!e)
    return SK_PASS;
  tp = to_tcp_sock(sk);
  if (!tp)
    return SK_PASS;
  if (e->side >= PL_X_LEG_APP)
    return from_leg(m, e, tp);
  r = record_of(e);
  if (!r) {
    xcount(PL_XR_NO_RECORD);
    return SK_PASS;
  }
  /* Its own key says whether the record still means this socket, in this place */
  if (e->side == PL_X_CLIENT) {
    if (r->client_key == e->key)
      return from_client(m, e, r, tp);
  } else if (e->side == PL_X_SERVER) {
    slot = *(volatile u32 *)&e->slot & (PL_X_SLOTS - 1);
    if (r->slots[slot].key == e->key)
      return from_server(m, e, r, tp, slot);
  }
  xcount(PL_XR_NO_RECORD);
  return SK_PASS;
}

/* Attached to xprobes: everything goes to the socket whose key the agent left as `record` */
int express_probe(struct sk_msg_md *m)
{
  struct bpf_sock *sk = m->sk;
  struct pl_xend *e;
  u64 key;

  if (!sk)
    return SK_PASS;
  e = xends.sk_storage_get(sk, 0, 0);
  if (!e)
    return SK_PASS;
  key = e->record;
  xprobes.msg_redirect_hash(m, &key, BPF_F_INGRESS);
  return SK_PASS;
}

#define MOVED_MAX 512 /* messages that are looked at */

/* TCP's own bytes that were moved and are not read yet. copied_seq counts what was read */
static inline u32 moved(void *tp)
{
  u64 psock = *(volatile u64 *)(tp + O_USER_DATA) & ~7ull, head = psock + O_INGRESS_MSG, next = 0, skb;
  u32 size, bytes = 0;

  read_kernel(&next, 8, (void *)head);
  KEEP_LOOP
  for (int i = 0; i < MOVED_MAX; i++) {
    skb = size = 0;
    if (next == head || read_kernel(&skb, 8, (void *)(next - O_MSG_LIST + O_MSG_SKB)) ||
        read_kernel(&size, 4, (void *)(next - O_MSG_LIST + O_MSG_SIZE)))
      break;
    if (skb) /* else redirected */
      bytes += size;
    if (read_kernel(&next, 8, (void *)next))
      break;
  }
  return bytes;
}

#define CUT_BYTES_MAX 4095 /* adjust_room() takes no more at once */
#define BEHIND_BYTES_MAX (64 << 20) /* more than a socket receives before it is moved: tcp_rmem is half of it at most */
#define CUTS_MAX 17 /* a segment is 64 KiB at most */

/* Attached to xreads and xprobereads: TCP's own bytes go where redirected ones do, so that order and FIONREAD are right.
 *
 * A segment may begin with bytes that came before: TCP sends again what was dropped, joined to what follows, when a reader
 * is slow. TCP's own recv() passes over them; what moves the segments of a socket in a sockmap moves them whole (seen on
 * 6.18, tcp_read_skb()), and the application would read those bytes twice. Here they are cut off. A socket that connects again
 * stays in the sockhash, with other numbers: what is known is not close behind what has come. (Not measured from what was read:
 * before 2026 kernels counted redirected bytes there, too.) */
int express_read(struct __sk_buff *skb)
{
  u32 seq = skb->cb[0], end = skb->cb[1], length = skb->len, again, part; /* struct tcp_skb_cb */
  u64 cookie = socket_cookie(skb);
  struct pl_xnext *known, fresh = {};
  struct bpf_sock *sk;
  void *tp;

  if (end - seq != length && end - seq != length + 1) /* FIN counts as one */
    return SK_PASS;
  sk = skb->sk;
  tp = sk ? to_tcp_sock(sk) : NULL;
  known = xnexts.lookup(&cookie);
  if (!known || (tp && TCP_U32(tp, O_RCV_NXT) - known->next > BEHIND_BYTES_MAX)) {
    fresh.next = tp ? TCP_U32(tp, O_COPIED_SEQ) + moved(tp) : seq;
    xnexts.update(&cookie, &fresh);
    known = xnexts.lookup(&cookie);
    if (!known)
      return SK_PASS;
  }
  if (known->broken)
    return SK_DROP;
  again = known->next - seq;
  if ((s32)again > 0) {
    if (again > length)
      again = length;
    KEEP_LOOP
    for (int i = 0; i < CUTS_MAX; i++) {
      part = again < CUT_BYTES_MAX ? again : CUT_BYTES_MAX;
      if (!part)
        break;
      if (adjust_room(skb, -(s32)part, 0, 0))
        break;
      again -= part;
    }
    if (again) { /* no memory: better no bytes than wrong ones */
      known->broken = 1;
      xcount(PL_XR_SENT_AGAIN_LOST);
      return SK_DROP;
    }
    xcount(PL_XR_SENT_AGAIN);
  }
  if ((s32)(end - known->next) > 0)
    known->next = end;
  return SK_PASS;
}
