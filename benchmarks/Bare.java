import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.Serializer;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;
import org.apache.kafka.streams.CloseOptions;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.processor.StateRestoreListener;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;

/** Read, update a table, write one output: on Kafka Streams, exactly_once_v2, one stream thread. */
public final class Bare {
    record Entry(long id, String account, long amount) {}

    record Balance(long id, String account, long balance) {}

    private static final ObjectMapper JSON = new ObjectMapper();

    /** The agent: the store is cached and logged, as the tables of Kafka Streams' own DSL are. */
    static final class AddUp implements Processor<String, Entry, String, Balance> {
        private ProcessorContext<String, Balance> context;
        private KeyValueStore<String, Long> balances;

        @Override
        public void init(ProcessorContext<String, Balance> context) {
            this.context = context;
            balances = context.getStateStore("balances");
        }

        @Override
        public void process(Record<String, Entry> record) {
            Entry entry = record.value();
            Long before = balances.get(record.key());
            long balance = (before == null ? 0 : before) + entry.amount();
            balances.put(record.key(), balance);
            context.forward(record.withValue(new Balance(entry.id(), entry.account(), balance)));
        }
    }

    /** Says how many records all partitions restored, and how long it took from the first one's start to the last one's end. */
    static final class Restores implements StateRestoreListener {
        private long startedNs;
        private int running;
        private long records;

        @Override
        public synchronized void onRestoreStart(TopicPartition partition, String store, long start, long end) {
            if (startedNs == 0) {
                startedNs = System.nanoTime();
            }
            running++;
        }

        @Override
        public void onBatchRestored(TopicPartition partition, String store, long end, long count) {}

        @Override
        public synchronized void onRestoreEnd(TopicPartition partition, String store, long total) {
            records += total;
            if (--running == 0) {
                System.out.printf("%d records restored in %.3f s%n", records, (System.nanoTime() - startedNs) / 1e9);
            }
        }
    }

    public static void main(String[] arguments) throws InterruptedException {
        Map<String, String> env = System.getenv();
        String prefix = env.get("KAFKA_PREFIX");
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, prefix + "bench-kafka-streams");
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, env.get("KAFKA_URL").replace("kafka://", ""));
        settings.put(
                StreamsConfig.STATE_DIR_CONFIG,
                Path.of(env.get("STREAMS_APP_DATADIR"), env.get("STREAMS_APP_SLOT")).toString());
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 100);
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1);

        KafkaStreams streams = new KafkaStreams(topology(prefix), settings);
        CountDownLatch ended = new CountDownLatch(1);
        streams.setGlobalStateRestoreListener(new Restores());
        streams.setStateListener((now, before) -> System.out.println(now));
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            ended.countDown();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        // It leaves its group when it ends, or its successor would wait for its session's end.
        CloseOptions leaving = CloseOptions.groupMembershipOperation(CloseOptions.GroupMembershipOperation.LEAVE_GROUP)
                .withTimeout(Duration.ofSeconds(10));
        Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(leaving)));
        streams.start();
        ended.await();
        System.exit(1);
    }

    private static Topology topology(String prefix) {
        return new Topology()
                .addSource("entries", new StringDeserializer(), reader(Entry.class), prefix + "entries")
                .addProcessor("add-up", AddUp::new, "entries")
                .addStateStore(
                        Stores.keyValueStoreBuilder(
                                        Stores.persistentKeyValueStore("balances"), Serdes.String(), Serdes.Long())
                                .withCachingEnabled(),
                        "add-up")
                .addSink("outputs", prefix + "outputs", new StringSerializer(), writer(), "add-up");
    }

    private static <T> Deserializer<T> reader(Class<T> type) {
        var reader = JSON.readerFor(type);
        return (topic, bytes) -> {
            try {
                return reader.readValue(bytes);
            } catch (IOException error) {
                throw new SerializationException(error);
            }
        };
    }

    private static Serializer<Balance> writer() {
        var writer = JSON.writerFor(Balance.class);
        return (topic, value) -> {
            try {
                return writer.writeValueAsBytes(value);
            } catch (IOException error) {
                throw new SerializationException(error);
            }
        };
    }
}
